"""Changes that other code made to a pruned model: replaced tensors, and weights in masked rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsekern.files.schema import shorten
from sparsekern.graph import ChannelGraph
from sparsekern.prune.state.masking import Masks


def replaced_tensor(
    graph: ChannelGraph, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> str:
    """A message that names the first tensor with channels that was replaced; empty if there is none.

    Args:
        graph: the tensors with channels, and their shapes.
        parameters: the parameters that the optimizer and the Pruner hold, by name.
        tensors: the model's parameters and buffers as they are now, by every name.
    """
    for name, slots in graph.tensors.items():
        tensor = tensors.get(name)
        if slots.kind == "parameter" and tensor is not parameters[name]:
            now = "none of that name" if tensor is None else "another object of that name"
            return (
                f"model: got {now} in place of the parameter {name!r} that the optimizer and the Pruner "
                f"hold, expected the same object; write into it (load_state_dict, parameter.data.copy_), or "
                f"make a new optimizer and a new Pruner for this model"
            )
        if tensor is None or tuple(tensor.shape) != slots.shape:
            shape = None if tensor is None else list(tensor.shape)
            return (
                f"model: got {name!r} of shape {shape}, expected {list(slots.shape)} as the Pruner left it; "
                f"write values of that shape into it"
            )
    return ""


def written_masked(graph: ChannelGraph, masks: Masks) -> str:
    """A message that names the groups whose masked rows are not zero; empty if all are zero."""
    counts = masks.count_written()
    if not counts.any():
        return ""
    own = [(int(counts[group.channels].sum()), group.name) for group in graph.groups]
    found = [f"{name} ({count})" for count, name in own if count]
    return (
        f"masked rows: got {int(counts.sum())} that are not zero, of {shorten(found)}, expected zeros: "
        f"weights were written after their channels had been masked; call pruner.remask() to zero them "
        f"again, or take weights from after pruner.finished"
    )
