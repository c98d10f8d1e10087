"""Timing the ops of a network at a few widths, and whole networks to set them right."""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.compact import compact, make_plan
from sparsekern.compact.surgery import unwrap
from sparsekern.compact.verify import as_arguments
from sparsekern.graph import ChannelGraph
from sparsekern.graph.operations import Operation
from sparsekern.latency.axes import POINTS, Axis, lay_axes
from sparsekern.latency.cache import Cache, directory
from sparsekern.latency.calls import FAILURES, Call
from sparsekern.latency.model import LatencyModel
from sparsekern.latency.replay import Replay
from sparsekern.latency.timing import Stopwatch

_LOG = logging.getLogger(__name__)

# An op's time is the shortest of so many visits, made in turn with all others.
ROUNDS = 3
# Uniform widths at which whole networks are timed, beside the full one, and how often.
SHARES = (0.5, 0.2)
PASSES = 9
# oneDNN computes 16 channels together, tensor cores 8.
NATURAL = {"cpu": 16, "cuda": 8}


@torch.inference_mode()
def measure(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    round_to: int = 1,
    cache: str | os.PathLike[str] | None = None,
) -> LatencyModel:
    """How long a forward pass takes with any set of kept channels, on this machine as it is now.

    Every op of the network, with the shapes, dtypes and memory formats that it has on the example inputs,
    is timed by itself at a few widths, with the number of threads that is set; then all of them in their
    order at three widths, where caches are cold; then copies of the network at those widths, which tell what
    a pass takes beside its ops. Evaluation mode, no gradients.
    Timings are kept in a file of the directory ``cache``: what was timed before on this device, with this
    torch and as many threads is not timed again.

    Args:
        model: where it runs; it stays as it is.
        graph: its channels.
        example_inputs: a tensor or a tuple of the positional arguments.
        round_to: widths are going to be multiples of it; prices are averages over so many channels
            (over 16 on a CPU and 8 on a GPU, which those compute together, where it is 1).
        cache: a directory; default ``$SPARSEKERN_CACHE``, else the user's cache directory.

    Raises:
        OSError: the file of timings cannot be written.
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
    _settle(found, stored, device)
    _calibrate(found, model, example_inputs, stored, device)
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


def _settle(found: LatencyModel, stored: Cache, device: torch.device) -> None:
    """Bring the tables to what each op takes between the others, as it was timed at three widths."""
    operations = found.graph.operations
    alone, within = [], []
    for kept in _uniform(found.graph, found.block):
        sizes = found.graph.costs.sizes(kept)
        key = _network_key(operations, sizes)
        keys = [f"{key}/{number}" for number in range(len(operations))]
        if any(name not in stored.seconds for name in keys):
            replay, watch = Replay(operations, sizes, device), Stopwatch(device)
            times = np.median([replay.seconds(watch) for _ in range(PASSES)][1:], axis=0)
            stored.seconds |= dict(zip(keys, np.nan_to_num(times).tolist(), strict=True))
            stored.save()
        alone.append(found.of_each(kept))
        within.append(1e9 * np.array([stored.seconds[name] for name in keys]))
    found.settle(np.array(alone), np.array(within))


def _calibrate(
    found: LatencyModel, model: nn.Module, example_inputs: Any, stored: Cache, device: torch.device
) -> None:
    """Set scale and overhead from whole networks of three widths."""
    operations = found.graph.operations
    widths = list(_uniform(found.graph, found.block))
    keys = [_network_key(operations, found.graph.costs.sizes(kept)) for kept in widths]
    if any(key not in stored.seconds for key in keys):
        seconds = _time_networks(found, model, example_inputs, widths, device)
        stored.seconds |= dict(zip(keys, seconds, strict=True))
        stored.save()
    of_ops = np.array([found.of_each(kept).sum() for kept in widths])
    whole = 1e9 * np.array([stored.seconds[key] for key in keys])
    found.scale, found.overhead = _line(of_ops, whole)


def _uniform(graph: ChannelGraph, block: int) -> Iterator[np.ndarray]:
    """All channels, then the first ones of every group, about the same share of each: bool ``[C]``."""
    for share in (1.0, *SHARES):
        kept = np.zeros(graph.num_channels, bool)
        for group in graph.groups:
            size = len(group.channels)
            width = min(size, max(block, round(share * size / block) * block))
            kept[group.channels[:width]] = True
        yield kept


def _network_key(operations: Sequence[Operation], sizes: np.ndarray) -> str:
    text = "\n".join(Call(operation, sizes).key for operation in operations)
    return f"network {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _time_networks(
    found: LatencyModel, model: nn.Module, example_inputs: Any, widths: list[np.ndarray], device: torch.device
) -> list[float]:
    """Seconds of a pass of each: that of the widest, times the median ratio to it in the same round."""
    args, kwargs = as_arguments(example_inputs)
    runs = {}
    for number, kept in enumerate(widths):
        small = compact(model, make_plan(found.graph, kept)).eval()
        runs[str(number)] = partial(small, *args, **kwargs)
    times = np.array(list(Stopwatch(device).turns(runs, PASSES).values()))
    ratios = np.median(times / times[0], axis=1)
    return [float(ratio * statistics.median(times[0])) for ratio in ratios]


def _line(of_ops: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Scale and overhead (at least 0) with ``scale * of_ops + overhead`` closest to ``whole``, relatively."""
    rows = np.stack([of_ops, np.ones_like(of_ops)], axis=1) / whole[:, None]
    scale, overhead = np.linalg.lstsq(rows, np.ones_like(whole), rcond=None)[0]
    if overhead < 0 or scale <= 0:
        relative = of_ops / whole
        return float(relative.sum() / (relative**2).sum()), 0.0
    return float(scale), float(overhead)
