"""Timing the ops of a network, each by itself at a few widths."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.compact.verify import as_arguments
from sparsekern.distributed.tensors import unwrap
from sparsekern.graph import ChannelGraph
from sparsekern.latency.axes import POINTS, Axis, lay_axes
from sparsekern.latency.cache import Cache, directory
from sparsekern.latency.calls import FAILURES, Call
from sparsekern.latency.model import LatencyModel
from sparsekern.latency.timing import Stopwatch
from sparsekern.latency.whole import adjust

_LOG = logging.getLogger(__name__)

# An op's time is the shortest of so many visits, made in turn with all others.
ROUNDS = 3
# oneDNN computes 16 channels together, tensor cores 8.
NATURAL = {"cpu": 16, "cuda": 8}


@torch.inference_mode()
def measure(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    round_to: int = 1,
    cache: str | os.PathLike[str] | None = None,
) -> LatencyModel:
    """How long a forward pass takes with any set of kept channels, on this machine as it is now.

    Every op of the network, with the shapes, dtypes and memory formats that it has on the example inputs,
    is timed by itself at a few widths, with the number of threads that is set; then all of them in their
    order at three widths, where caches are cold, and copies of the network at several, which tell what a
    pass takes beside its ops. Evaluation mode, no gradients.
    On Linux the allocator gives large tensors' memory back to the system and asks for it anew, which takes
    longer than many an op, at one width and not at another: times are shorter, and predicted within a few
    percent, in a process started with ``MALLOC_MMAP_THRESHOLD_=4294967296`` and
    ``MALLOC_TRIM_THRESHOLD_=4294967296`` in its environment.

    Timings are kept in a file of the directory ``cache``: what was timed before on this device, with this
    torch and as many threads is not timed again.

    Args:
        model: where it runs; it stays as it is.
        graph: its channels.
        example_inputs: a tensor or a tuple of the positional arguments.
        example_kwargs: keyword arguments that go with them.
        round_to: widths are going to be multiples of it; prices are averages over so many channels
            (over 16 on a CPU and 8 on a GPU, which those compute together, where it is 1).
        cache: a directory; default ``$SPARSEKERN_CACHE``, else the user's cache directory.

    Timings that cannot be read or written cost time alone: there is a warning that names the file.
    """
    model = unwrap(model)
    device = next(model.parameters()).device
    natural = NATURAL.get(device.type, 1)
    stored = Cache(directory(cache), device)
    axes, axes_of = lay_axes(graph, graph.operations, round_to, natural)
    calls = _calls(graph, axes, axes_of)
    _time_calls({call.key: call for call in calls.values()}, stored, device)
    times = _table(len(graph.operations), calls, stored.seconds)
    found = LatencyModel(graph, axes, axes_of, times, block=round_to if round_to > 1 else natural)
    adjust(found, model, as_arguments(example_inputs, example_kwargs), stored, device)
    return found


def _calls(graph: ChannelGraph, axes: list[Axis], axes_of: np.ndarray) -> dict[tuple[int, int, int], Call]:
    """What has to be timed, by operation and position on the grids of its axes."""
    full = graph.costs.sizes(np.ones(graph.num_channels, bool))
    calls = {}
    for number, operation in enumerate(graph.operations):
        own = [axes[axis] for axis in axes_of[number] if axis >= 0]
        for i, j in np.ndindex(*(len(axis.grid) for axis in own), *[1] * (2 - len(own))):
            sizes = full.copy()
            for axis, position in zip(own, (i, j), strict=False):
                _resize(sizes, axis, axis.grid[position])
            calls[number, i, j] = Call(operation, sizes)
    return calls


def _resize(sizes: np.ndarray, axis: Axis, width: float) -> None:
    if len(axis.extents) == 1:
        sizes[axis.extents[0]] = int(width)
        return
    for extent in axis.extents:
        sizes[extent] = max(1, round(sizes[extent] * width / axis.full))


def _time_calls(calls: Mapping[str, Call], stored: Cache, device: torch.device) -> None:
    """Time what is not stored yet, and store it. Calls that fail are left out."""
    missing = {key: call for key, call in calls.items() if key not in stored.seconds}
    if not missing:
        return
    _LOG.info("timing %d ops of %d; kept in %s", len(missing), len(calls), stored.path)
    found: dict[str, float] = {}
    watch = Stopwatch(device)
    for _ in range(ROUNDS):
        for key, call in list(missing.items()):
            try:
                seconds = watch.visit(call.prepare(device))
            except FAILURES:
                del missing[key]
                continue
            found[key] = min(seconds, found.get(key, float("inf")))
    stored.seconds |= found
    stored.save()


def _table(
    operations: int, calls: Mapping[tuple[int, int, int], Call], seconds: Mapping[str, float]
) -> np.ndarray:
    """Nanoseconds, float64 ``[operations, POINTS, POINTS]``; grids that are shorter repeat their last.

    An op that did not run at some width (its arguments name sizes) is taken to need time in proportion to
    the numbers that it reads there; one that did not run at all, none.
    """
    table = np.zeros((operations, POINTS, POINTS))
    last = _last_positions(calls)
    for (number, i, j), call in calls.items():
        whole = calls[(number, *last[number])]
        time = seconds.get(call.key)
        if time is None:
            time = seconds.get(whole.key, 0.0) * call.elements / max(whole.elements, 1)
        table[number, i, j] = 1e9 * time
    for number, (i, j) in last.items():
        table[number, i:, : j + 1] = table[number, i, : j + 1]
        table[number, :, j:] = table[number, :, j, None]
    return table


def _last_positions(calls: Mapping[tuple[int, int, int], Call]) -> dict[int, tuple[int, int]]:
    last: dict[int, tuple[int, int]] = {}
    for number, i, j in calls:
        last[number] = max(last.get(number, (0, 0)), (i, j))
    return last
