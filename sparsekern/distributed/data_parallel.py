"""Rebuilding DistributedDataParallel after its model's tensors have become smaller.

The reducer stores each gradient's position in buckets, with the tensor sizes at its construction. The wrapper
belongs to the user and stays the same object. Its reducer is built again, in the way in which torch builds it
for an unpickled wrapper.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

_MODULE = "torch.nn.parallel.distributed"


def wrappers_of(model: nn.Module) -> list[Any]:
    """Every DistributedDataParallel of this process that contains ``model``.

    The search covers all live objects: a wrapper that keeps an old reducer would silently leave the gradients
    of each process unreduced.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    kind = sys.modules[_MODULE].DistributedDataParallel
    found = [held for held in gc.get_objects() if issubclass(type(held), kind)]
    return [wrapper for wrapper in found if any(module is model for module in wrapper.module.modules())]


def check_rebuildable(wrapper: Any) -> None:
    """Check that the reducer of ``wrapper`` can be built again for tensors of other sizes.

    Raises:
        ValueError: an option or a communication hook of the wrapper may depend on tensor sizes.
    """
    reasons = {
        "mixed_precision": wrapper.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(wrapper._delay_all_reduce_params),
        "torch._dynamo.config.optimize_ddp='python_reducer'": wrapper._use_python_reducer,
    }
    for option, given in reasons.items():
        if given:
            raise ValueError(
                f"model: got a DistributedDataParallel with {option}, which cannot be rebuilt for smaller "
                f"tensors, expected one without"
            )
    known = (type(None), torch.distributed.ProcessGroup)
    for hook, state in wrapper._comm_hooks:
        if not isinstance(state, known):
            raise ValueError(
                f"model: got a DistributedDataParallel whose communication hook {_name(hook)} has a "
                f"{type(state).__name__} as state, which may depend on the sizes of buckets, expected a hook "
                f"whose state is None or a process group"
            )
    if not wrapper._comm_hooks and (builtin := _builtin_hook(wrapper)):
        raise ValueError(
            f"model: got a DistributedDataParallel with torch's built-in communication hook {builtin}, which "
            f"cannot be registered a second time, expected one of torch.distributed.algorithms.ddp_comm_hooks"
        )


def rebuild(wrapper: Any, hooks: Sequence[tuple[Any, Any]]) -> None:
    """Build a new reducer for the present tensors.

    Args:
        wrapper: a DistributedDataParallel; its options stay the same.
        hooks: communication hooks, each with its state.
    """
    # The old reducer is freed first, because it keeps hooks on the parameters while it exists.
    wrapper.logger = wrapper.reducer = None
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
    wrapper._comm_hooks = []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


class Rebuilding:
    """New reducers for the wrappers of a model, after success and after failure.

    The caller creates this before the tensors change, so that ``undo`` first restores the tensors and then
    rebuilds the reducers. Every process rebuilds, however far it got: the construction of a reducer
    communicates with the new reducers of all other processes.

    Args:
        wrappers: the DistributedDataParallel modules.
        undo: the stack that gets :meth:`carry_out` as a callback.
    """

    def __init__(self, wrappers: Sequence[Any], undo: ExitStack) -> None:
        self._hooks = [(wrapper, list(wrapper._comm_hooks)) for wrapper in wrappers]
        undo.callback(self.carry_out)

    def carry_out(self) -> None:
        """Build the reducers; the tensors must have their final sizes."""
        for wrapper, hooks in self._hooks:
            rebuild(wrapper, hooks)


def _builtin_hook(wrapper: Any) -> str:
    """Name of the wrapper's built-in communication hook; empty for none."""
    # Only the logger stores the name of a hook that is built into torch.
    name = str(wrapper.logger._get_ddp_logging_data().strs_map.get("comm_hook", ""))
    return name if name.startswith("Builtin") else ""


def _name(hook: Any) -> str:
    """Name of a communication hook, for messages."""
    return getattr(hook, "__qualname__", type(hook).__name__)
