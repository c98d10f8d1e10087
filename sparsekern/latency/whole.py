"""Timing whole networks, and all their ops in sequence, to correct the tables of single ops."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsekern.compact import compact, make_plan
from sparsekern.graph import ChannelGraph
from sparsekern.graph.propagate.operations import Operation
from sparsekern.latency.cache import Cache
from sparsekern.latency.calls import Call
from sparsekern.latency.model import LatencyModel
from sparsekern.latency.replay import Replay
from sparsekern.latency.timing import Stopwatch

# Kept shares of networks with the same share in all groups; their ops are also timed in sequence.
EVEN = (1.0, 0.5, 0.2)
# Mean kept shares of networks with a random share in each group.
UNEVEN = (0.7, 0.6, 0.5, 0.4, 0.3)
# Each round times all networks once. There are at least ROUNDS rounds. More follow until the networks have
# run for SHORTEST seconds, up to MOST_ROUNDS rounds.
ROUNDS = 15
SHORTEST = 3.0
MOST_ROUNDS = 100


Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward pass."""


def adjust(
    found: LatencyModel, model: nn.Module, example: Example, stored: Cache, device: torch.device
) -> None:
    """Fit the tables to timings of ops in sequence, and their sum to timings of whole networks.

    Args:
        found: the model to correct in place.
        model: the network; it is not changed.
        example: arguments of its forward pass.
        stored: known timings; new ones are added and saved.
        device: device of the network.
    """
    graph, operations = found.graph, found.graph.operations
    widths = widths_of(graph, found.block)
    keys = [network_key(operations, graph.costs.sizes(kept)) for kept in widths]
    of_ops = [[f"{key}/{number}" for number in range(len(operations))] for key in keys[: len(EVEN)]]
    names = [*keys, *(name for row in of_ops for name in row)]
    if any(name not in stored.seconds for name in names):
        whole, single = _time(found, model, example, widths, device)
        stored.seconds |= dict(zip(names, [*whole, *single.ravel().tolist()], strict=True))
        stored.save()
    alone = np.array([found.of_each(kept) for kept in widths[: len(EVEN)]])
    found.settle(alone, 1e9 * np.array([[stored.seconds[name] for name in row] for row in of_ops]))
    sums = np.array([found.of_each(kept).sum() for kept in widths])
    found.scale, found.overhead = _line(sums, 1e9 * np.array([stored.seconds[key] for key in keys]))


def widths_of(graph: ChannelGraph, block: int) -> list[np.ndarray]:
    """The channels of all networks that are timed, the full one first: bool ``[C]`` each."""
    return [*_even(graph, block), *_uneven(graph, block)]


def _even(graph: ChannelGraph, block: int) -> Iterator[np.ndarray]:
    """For each share of ``EVEN``, that share of the first channels of every group: bool ``[C]``."""
    for share in EVEN:
        yield _first(graph, block, np.full(len(graph.groups), share))


def _uneven(graph: ChannelGraph, block: int) -> Iterator[np.ndarray]:
    """For each mean share of ``UNEVEN``, the first channels of every group, random shares: bool ``[C]``."""
    random = np.random.default_rng(0)
    for share in UNEVEN:
        yield _first(graph, block, share * random.uniform(0.3, 1.7, len(graph.groups)))


def _first(graph: ChannelGraph, block: int, shares: np.ndarray) -> np.ndarray:
    """Keep the first channels of each group, a multiple of ``block`` near its share: bool ``[C]``."""
    kept = np.zeros(graph.num_channels, bool)
    for group, share in zip(graph.groups, shares, strict=True):
        size = len(group.channels)
        width = min(size, max(block, round(share * size / block) * block))
        kept[group.channels[:width]] = True
    return kept


def network_key(operations: Sequence[Operation], sizes: np.ndarray) -> str:
    """Key of a network in the cache: a digest of all its calls at these sizes."""
    text = "\n".join(Call(operation, sizes).key for operation in operations)
    return f"network {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _time(
    found: LatencyModel, model: nn.Module, example: Example, widths: list[np.ndarray], device: torch.device
) -> tuple[list[float], np.ndarray]:
    """Seconds of a network with each of ``widths``, and of each op in sequence.

    Every round times all networks. Each time is divided by the relative time of the first (full) network in
    the same round, so that a slow phase of the machine affects all alike. Results are medians over rounds.

    Returns:
        Seconds of the networks, ``[len(widths)]``, and of their ops, float64 ``[len(EVEN), ops]``.
    """
    args, kwargs = example
    watch, graph = Stopwatch(device), found.graph
    networks: list[Callable[[], Any]] = [
        partial(compact(model, make_plan(graph, kept)).eval(), *args, **kwargs) for kept in widths
    ]
    replays = [Replay(graph.operations, graph.costs.sizes(kept), device) for kept in widths[: len(EVEN)]]
    whole: list[list[float]] = []
    single: list[list[list[float]]] = []
    for run in networks:
        run()
    while len(whole) < ROUNDS or (len(whole) < MOST_ROUNDS and sum(map(sum, whole)) < SHORTEST):
        whole.append([watch.seconds(run) for run in networks])
        single.append([replay.seconds(watch) for replay in replays])
    full = statistics.median(row[0] for row in whole)
    pace = np.array([row[0] / full for row in whole])
    of_whole = np.median(np.array(whole) / pace[:, None], axis=0)
    return of_whole.tolist(), np.nan_to_num(np.median(np.array(single) / pace[:, None, None], axis=0))


def _line(of_ops: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Fit ``whole = scale * of_ops + overhead`` with scale and overhead of at least 0.

    The line passes through the first network, the full one, because budgets are shares of its time. The fit
    minimises the squared relative errors of the other networks.

    Args:
        of_ops: float64 ``[n]``, summed times of the ops of each network.
        whole: float64 ``[n]``, times of the whole networks, in the same unit.

    Returns:
        The scale and the overhead.
    """
    ops, time = of_ops[0] - of_ops[1:], whole[0] - whole[1:]
    weight = whole[1:] ** -2.0
    scale = float((weight * ops * time).sum() / max((weight * ops * ops).sum(), 1e-30))
    scale = min(max(scale, 0.0), float(whole[0] / max(of_ops[0], 1e-9)))
    return scale, float(whole[0] - scale * of_ops[0])
