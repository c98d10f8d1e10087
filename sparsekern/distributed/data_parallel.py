"""DistributedDataParallel around a model whose tensors have become smaller.

Its reducer holds on to the gradients' places in buckets, of sizes from when it was made. The module that
wraps is the user's and stays; its reducer is made anew, in the way in which torch makes it for a wrapper that
comes out of a pickle.
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
    """Every DistributedDataParallel of this process that ``model`` is, or is a part of.

    They are found wherever they are kept: a wrapper that goes on with a reducer of old would silently
    leave gradients as they are in each process.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    kind = sys.modules[_MODULE].DistributedDataParallel
    found = [held for held in gc.get_objects() if issubclass(type(held), kind)]
    return [wrapper for wrapper in found if any(module is model for module in wrapper.module.modules())]


def check_rebuildable(wrapper: Any) -> None:
    """The reducer of ``wrapper`` can be made anew for tensors of other sizes.

    Raises:
        ValueError: it was made with an option, or has a communication hook, that knows of sizes.
    """
    reasons = {
        "mixed_precision": wrapper.mixed_precision is not None,
        "delay_all_reduce_named_params": bool(wrapper._delay_all_reduce_params),
        "torch._dynamo.config.optimize_ddp='python_reducer'": wrapper._use_python_reducer,
    }
    for option, given in reasons.items():
        if given:
            raise ValueError(f"model: its DistributedDataParallel has {option}, which cannot be cut in place")
    known = (type(None), torch.distributed.ProcessGroup)
    for hook, state in wrapper._comm_hooks:
        if not isinstance(state, known):
            raise ValueError(
                f"model: its DistributedDataParallel has the communication hook {_name(hook)} with a "
                f"{type(state).__name__}, which may know the sizes of buckets; expected a hook whose state "
                f"is None or a process group"
            )
    if not wrapper._comm_hooks and (builtin := _builtin_hook(wrapper)):
        raise ValueError(
            f"model: its DistributedDataParallel has torch's built-in communication hook {builtin}, which "
            f"cannot be registered anew; expected one of torch.distributed.algorithms.ddp_comm_hooks"
        )


def rebuild(wrapper: Any, hooks: Sequence[tuple[Any, Any]]) -> None:
    """A new reducer for the tensors as they are, with the same options and the communication ``hooks``."""
    # The old one goes first: it keeps hooks on the parameters for as long as it lives.
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
    """New reducers for the wrappers of a model, also where something fails.

    Made before the tensors change, so that ``undo`` rebuilds the reducers after it has restored the tensors.
    It does so in every process, wherever that had got to: a new reducer agrees on its buckets with those of
    the other processes, which have to be new, too.
    """

    def __init__(self, wrappers: Sequence[Any], undo: ExitStack) -> None:
        self._hooks = [(wrapper, list(wrapper._comm_hooks)) for wrapper in wrappers]
        undo.callback(self.carry_out)

    def carry_out(self) -> None:
        """The tensors have their sizes now."""
        for wrapper, hooks in self._hooks:
            rebuild(wrapper, hooks)


def _builtin_hook(wrapper: Any) -> str:
    # Where a hook is torch's own, only the logger knows.
    name = str(wrapper.logger._get_ddp_logging_data().strs_map.get("comm_hook", ""))
    return name if name.startswith("Builtin") else ""


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
