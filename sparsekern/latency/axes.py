"""The widths that the ops of a network depend on, and the grids of widths at which ops are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsekern.graph import ChannelGraph
from sparsekern.graph.propagate.operations import Operation

# Largest number of widths at which an op is timed along one axis.
POINTS = 5


@dataclass(frozen=True, eq=False)
class Axis:
    """A width that ops depend on: ``constant + of_atom @ (kept channels of every atom)``.

    Attributes:
        extents: the graph's extents whose weighted sum is the width.
        constant: part of the width that does not depend on kept channels.
        of_atom: float64 ``[atoms]``, width of one kept channel of each atom.
        full: width in the whole network.
        step: a width takes as long as the next higher multiple of the step; 0 for no steps.
        grid: float64, the widths at which ops are timed, rising; the last one is ``full``.
    """

    extents: tuple[int, ...]
    constant: float
    of_atom: np.ndarray
    full: float
    step: float
    grid: np.ndarray


def lay_axes(
    graph: ChannelGraph, operations: Sequence[Operation], block: int, natural: int
) -> tuple[list[Axis], np.ndarray]:
    """The axes of all operations.

    An op that depends on more than two widths (a concatenation of many tensors) has one axis: the sum of its
    widths, each weighted by the number of elements per index.

    Args:
        graph: the channels.
        operations: the operations of the graph.
        block: later widths are multiples of this number of channels.
        natural: number of channels that the device computes together; used if ``block`` is 1.

    Returns:
        The axes, and int64 ``[ops, 2]``, the indices of each operation's axes; -1 for none.
    """
    axes: list[Axis] = []
    known: dict[tuple[int, ...], int] = {}
    of_operation = np.full((len(operations), 2), -1, np.int64)
    everything = graph.all_channels()
    full = graph.costs.sizes(everything)
    share = graph.costs.share
    moves = np.count_nonzero(share, axis=1)
    for index, operation in enumerate(operations):
        weights = _weights(operation, moves)
        keys = [(extent,) for extent in weights] if len(weights) <= 2 else [(-1 - index,)]
        for position, key in enumerate(keys):
            if key not in known:
                known[key] = len(axes)
                single = {key[0]: 1.0} if key[0] >= 0 else weights
                axes.append(_axis(share, graph.costs.stays, full, single, block, natural))
            of_operation[index, position] = known[key]
    return axes, of_operation


def _weights(operation: Operation, moves: np.ndarray) -> dict[int, float]:
    """The variable extents of an operation's operands, each with its number of elements per index."""
    weights: dict[int, float] = {}
    for operand in operation.operands():
        total = float(np.prod(operand.shape))
        for size, extent in zip(operand.shape, operand.extents, strict=True):
            if extent is not None and moves[extent]:
                weights[extent] = weights.get(extent, 0.0) + total / size
    return weights


def _axis(
    share: np.ndarray,
    stays: np.ndarray,
    full: np.ndarray,
    weights: dict[int, float],
    block: int,
    natural: int,
) -> Axis:
    """The axis of the extents in ``weights``; ``share`` and ``stays`` are those of the cost model."""
    extents = tuple(weights)
    factors = np.array(list(weights.values()))
    own = share[list(extents)]
    of_atom, constant = factors @ own, float(factors @ stays[list(extents)])
    whole = float(factors @ full[list(extents)])
    if len(extents) > 1:
        grid = whole * np.linspace(0.2, 1, POINTS)
        return Axis(extents, constant, of_atom, whole, 0.0, grid)
    # A channel can cover several indices of the extent, as for a head or a flattened feature map.
    indices = int(own[own > 0].min())
    step = indices * (block if block > 1 else -(-natural // indices))
    return Axis(extents, constant, of_atom, whole, float(step), _grid(int(whole), int(constant), step))


def _grid(full: int, constant: int, step: int) -> np.ndarray:
    """At most ``POINTS`` widths: ``full`` and multiples of ``step``, closer together at small widths."""
    first = -(-max(constant, 1) // step) * step
    multiples = [float(width) for width in range(first, full, step)]
    widths = [*multiples, float(full)]
    if len(widths) <= POINTS:
        return np.array(widths)
    wanted = np.geomspace(widths[0], widths[-1], POINTS)
    nearest = {int(np.abs(np.array(widths) - width).argmin()) for width in wanted}
    return np.array([widths[position] for position in sorted(nearest)])
