"""Trying out a graph before it is relied on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsekern.graph.capture.export import Source, arguments, inner_module, lightly
from sparsekern.graph.channels import ChannelGraph
from sparsekern.graph.prove.trial import Layout, Trials


@lightly()
def dry_run(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Tensor | Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> ChannelGraph:
    """``graph`` without the groups whose channels ``model``'s own code does not let go.

    ``trace`` has tried out what it returns; this is for graphs that were changed since, such as by
    ``freeze``. A copy with about half of every group gone is run in evaluation and training mode, on
    fake tensors: no memory, no change to the model or to random state. Where that fails, or gives
    outputs of other shapes, the groups at fault are searched for and frozen, with the error as the
    reason. Returns ``graph`` itself where nothing fails.

    Raises ValueError if ``model`` is not a module, cannot be copied or does not accept the example
    inputs, or if ``graph`` is that of another model.
    """
    model = inner_module(model)
    source = Source(model, arguments(example_inputs), example_kwargs or {})
    trials = Trials(source, _layout(source, graph))
    faults: dict[int, str] = {}
    for training in (False, True):
        try:
            trials.expect_shapes(training)
        except Exception as error:
            if not training:
                raise source.rejected(training, error) from error
            # Batch norm refuses to train on a single value per channel: there is nothing to try.
            break
        left = [group for group in trials.groups if group not in faults]
        faults |= trials.failing(left, training)
    # Freezing renumbers the groups behind: from the last to the first, the numbers stay right.
    for number in sorted(faults, reverse=True):
        graph = graph.freeze([number], faults[number])
    return graph


def _layout(source: Source, graph: ChannelGraph) -> Layout:
    numbers = {name: number for number, entry in enumerate(source.tensors) for name in entry.names}
    wrong = [
        name
        for name, slots in graph.tensors.items()
        if name not in numbers or source.tensors[numbers[name]].shape != slots.shape
    ]
    if wrong:
        raise ValueError(f"graph: made for another model, this one has no tensor {wrong[0]!r} of its shape")
    return Layout(
        {numbers[name]: slots.shape for name, slots in graph.tensors.items()},
        {numbers[name]: slots.channels for name, slots in graph.tensors.items()},
        graph.group_of,
        {
            numbers[name]: {path: (dim, per) for path, dim, per in slots.sizes}
            for name, slots in graph.tensors.items()
        },
    )
