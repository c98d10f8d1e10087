"""The model's ATen graphs in evaluation and training mode, exported from a copy on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from sparsekern.distributed.tensors import check_in_memory, check_not_flattened, unwrap
from sparsekern.graph.capture.matching import attached
from sparsekern.graph.capture.program import Captured, Registered
from sparsekern.graph.capture.record import of_one_program
from sparsekern.graph.capture.source import Source, Undecided


@dataclass(frozen=True)
class Capture:
    """The result of tracing.

    Attributes:
        tensors: the model's parameters and buffers. A tied tensor appears once.
        graphs: one graph for each traced mode, evaluation mode first.
        source: the copy that the graphs are exported from.
        untraced: why there is no graph of training mode; empty if there is one.
    """

    tensors: tuple[Registered, ...]
    graphs: tuple[Captured, ...]
    source: Source
    untraced: str = ""


def inner_module(model: object) -> nn.Module:
    """Find the module to trace.

    Args:
        model: a module, or a wrapper of one such as by ``torch.compile`` or data parallelism.

    Returns:
        The wrapped module.

    Raises:
        ValueError: ``model`` is no module, is a FullyShardedDataParallel, or has parameters that are loaded
            for each forward pass.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    # The wrappers of torch.compile and data parallelism hold the module itself, with the same parameters.
    inner = unwrap(model)
    check_not_flattened(inner)
    check_in_memory(inner)
    return inner


def arguments(example_inputs: object) -> tuple[Any, ...]:
    """Make positional arguments from example inputs.

    Args:
        example_inputs: a tensor, or a tuple or list of positional arguments.

    Returns:
        The arguments.

    Raises:
        ValueError: ``example_inputs`` is anything else.
    """
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(args, (tuple, list)):
        raise ValueError(
            f"example_inputs: got {type(example_inputs).__name__}, expected a tensor or a tuple "
            "of the positional arguments of the model's forward; keyword arguments go into example_kwargs"
        )
    return tuple(args)


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Capture:
    """Trace ``model`` in both modes on fake tensors; ``model`` itself is never run or changed.

    If training mode raises and evaluation mode reads every parameter, the graph of evaluation mode is
    enough: the values that only training mode computes have no channels of their own.

    Args:
        model: the model.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.

    Returns:
        The model's tensors and its graphs.

    Raises:
        ValueError: ``model`` cannot be copied, has uninitialised parameters or decides by the values
            in tensors (the message names ``model``), or its forward rejects the inputs (the message
            names ``example_inputs``).
    """
    source = Source(model, args, kwargs)
    evaluation = source.export(False)
    if (whole := _of_both_modes(source, evaluation)) is not None:
        return Capture(source.tensors, (whole,), source)
    try:
        return Capture(source.tensors, (*evaluation, *source.export(True)), source)
    except Undecided:
        raise
    except ValueError as error:
        unread = _unread(source, evaluation)
        if unread:
            raise ValueError(
                f"{error}; training mode alone may read {len(unread)} parameters ({', '.join(unread[:3])}), "
                "so that evaluation mode does not tell which channels go together"
            ) from error
        return Capture(source.tensors, tuple(evaluation), source, str(error))


def _of_both_modes(source: Source, evaluation: Sequence[Captured]) -> Captured | None:
    """The graph of evaluation mode if it is that of training mode, too; else None."""
    if len(evaluation) > 1:
        return None
    try:
        ours, theirs = source.record(False), source.record(True)
    except Exception:
        return None
    if ours is None or theirs is None or (whole := attached(ours, evaluation[0])) is None:
        return None
    return replace(evaluation[0], record=whole, both=True) if of_one_program(ours, theirs) else None


def _unread(source: Source, graphs: Sequence[Captured]) -> list[str]:
    """The parameters that no op of the graphs reads."""
    read = {
        graph.sources.get(node.name)
        for graph in graphs
        for node in graph.module.graph.nodes
        if node.op == "placeholder" and node.users
    }
    return [t.names[0] for number, t in enumerate(source.tensors) if t.parameter and number not in read]
