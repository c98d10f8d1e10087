"""The dry run: tries a graph on a smaller copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsekern.graph.capture.export import arguments, inner_module
from sparsekern.graph.capture.source import Source
from sparsekern.graph.capture.undisturbed import low_overhead_tracing
from sparsekern.graph.channels import ChannelGraph
from sparsekern.graph.prove.trial import Layout, Trials


@low_overhead_tracing()
def dry_run(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Tensor | Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> ChannelGraph:
    """Freeze the groups whose channels cannot be removed because of code in ``model``.

    ``trace`` has tried the graph that it returns; this function is for graphs that were changed since,
    such as by ``freeze``. It runs a copy without about half of every group in evaluation and training
    mode, on fake tensors. This takes no memory and changes neither the model nor random state. If the
    copy fails or gives outputs of other shapes, the function searches for the groups at fault.

    Args:
        model: the network.
        graph: its channel graph.
        example_inputs: a tensor, or a sequence of positional arguments of the forward.
        example_kwargs: keyword arguments of the forward.

    Returns:
        ``graph`` with the groups at fault frozen, each with its error as the reason; ``graph`` itself
        if nothing fails.

    Raises:
        ValueError: ``model`` is not a module, cannot be copied or rejects the example inputs, or
            ``graph`` belongs to another model.
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
            # Batch norm refuses to train on a single value per channel: training mode is not tried.
            break
        left = [group for group in trials.groups if group not in faults]
        faults |= trials.failing(left, training)
    # Freezing renumbers only the later groups, so the loop goes from the last to the first.
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
        raise ValueError(f"graph: got one of another model with {wrong[0]!r}, expected tensors of this model")
    return Layout(
        {numbers[name]: slots.shape for name, slots in graph.tensors.items()},
        {numbers[name]: slots.channels for name, slots in graph.tensors.items()},
        graph.group_of,
        {
            numbers[name]: {path: (dim, per) for path, dim, per in slots.sizes}
            for name, slots in graph.tensors.items()
        },
        {numbers[name]: slots.rescale for name, slots in graph.tensors.items()},
    )
