"""Timing the ops of a network, each alone at a few widths."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.compact.verify import as_arguments
from sparsekern.distributed.tensors import unwrap
from sparsekern.files.cache import directory
from sparsekern.graph import ChannelGraph
from sparsekern.graph.propagate.operations import Operation
from sparsekern.latency.axes import POINTS, Axis, lay_axes
from sparsekern.latency.cache import Cache
from sparsekern.latency.calls import FAILURES, Call
from sparsekern.latency.elsewhere import fit_networks, time_units
from sparsekern.latency.model import LatencyModel
from sparsekern.latency.timing import Stopwatch
from sparsekern.latency.units import Unit, group_operations
from sparsekern.latency.whole import adjust
from sparsekern.runtimes import Runtime, check_runtime

_LOG = logging.getLogger(__name__)

# Each round times every op once; the time of an op is its minimum over the rounds.
ROUNDS = 3
# oneDNN computes 16 channels together, tensor cores 8.
NATURAL = {"cpu": 16, "cuda": 8}
# Runtimes that run an exported copy of the network.
EXPORTED = ("onnxruntime", "openvino")


@torch.inference_mode()
def measure(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    round_to: int = 1,
    runtime: Runtime = "torch",
    cache: str | os.PathLike[str] | None = None,
) -> LatencyModel:
    """Measure how long a forward pass takes with any set of kept channels, on this machine.

    Timings are in evaluation mode, without gradients, with the current number of threads:

    * Every op of the network is timed alone at a few widths, with the shapes, dtypes and memory formats that
      it has on the example inputs.
    * All ops are timed in sequence at three widths, with cold caches.
    * Copies of the network are timed at eight widths. They show the time of a pass outside its ops.

    On Linux the allocator returns the memory of large tensors to the system and requests it again. This takes
    longer than many ops, and happens at some widths only. Set ``MALLOC_MMAP_THRESHOLD_=4294967296`` and
    ``MALLOC_TRIM_THRESHOLD_=4294967296`` in the environment of the process: times are then shorter, and
    predictions are within a few percent.

    In ``"onnxruntime"`` and ``"openvino"``, what is timed alone are units as the runtime fuses them: a layer
    with its norm and activation, or a single op, from one export of all of them. For ``"compile"`` the ops
    are those of torch. Eight whole networks are then exported or compiled, and timed; factors for the layers,
    for grouped convolutions and for other ops are fitted to them. This takes minutes.

    Timings are stored in a file in the directory ``cache``. They are used again for the same device,
    versions of torch and of the runtime, and number of threads. If the file cannot be read or written, a
    warning names it and everything is measured again.

    Args:
        model: the network on the device to measure; it is not changed.
        graph: its channels.
        example_inputs: a tensor or a tuple of the positional arguments.
        example_kwargs: keyword arguments of ``model``.
        round_to: later widths are multiples of this number of channels. Prices are averages over as many
            channels; for 1, over 16 on a CPU and 8 on a GPU, which the hardware computes together.
        runtime: what the network runs in later: ``"torch"``, ``"compile"`` (``torch.compile``),
            ``"onnxruntime"`` or ``"openvino"``, on the CPU, with torch's number of threads.
        cache: a directory; default ``$SPARSEKERN_CACHE``, else the user's cache directory.

    Returns:
        The fitted model.

    Raises:
        TypeError: ``cache`` is not a path.
        ValueError: ``cache`` is not a valid name of a directory, there is no such runtime, or it is one of
            the CPU and ``model`` is on another device.
        ModuleNotFoundError: the runtime is not installed; the message names the extra that installs it.
    """
    check_runtime(runtime)
    model = unwrap(model)
    device = next(model.parameters()).device
    natural = NATURAL.get(device.type, 1)
    if runtime in EXPORTED and device.type != "cpu":
        raise ValueError(f"runtime: got {runtime!r} for a model on {device}, expected one on the CPU")
    stored = Cache(directory(cache), device, runtime)
    # These runtimes pad channels to whole blocks, so that other widths take as long as the next block.
    padded = runtime in EXPORTED and natural % round_to == 0
    block = round_to if round_to > 1 and not padded else natural
    axes, axes_of = lay_axes(graph, graph.operations, block if padded else round_to, natural)
    calls: dict[tuple[int, int, int], Any]
    if runtime in EXPORTED:
        calls = _calls(graph, axes, axes_of, group_operations(graph.operations), Unit)
        time_units({unit.key: unit for unit in calls.values()}, stored, runtime)
        seconds = stored.seconds
    else:
        alone = {number: [operation] for number, operation in enumerate(graph.operations)}
        calls = _calls(graph, axes, axes_of, alone, _call)
        ops = stored if runtime == "torch" else Cache(directory(cache), device)
        _time_calls({call.key: call for call in calls.values()}, ops, device)
        seconds = ops.seconds
    times = _table(len(graph.operations), calls, seconds)
    found = LatencyModel(graph, axes, axes_of, times, block=block)
    example = as_arguments(example_inputs, example_kwargs)
    if runtime == "torch":
        adjust(found, model, example, stored, device)
    else:
        fit_networks(found, model, example, stored, device, runtime)
    return found


def _call(operations: Sequence[Operation], sizes: np.ndarray) -> Call:
    """The call of a single operation."""
    (operation,) = operations
    return Call(operation, sizes)


def _calls(
    graph: ChannelGraph,
    axes: list[Axis],
    axes_of: np.ndarray,
    units: Mapping[int, Sequence[Operation]],
    make: Callable[[Sequence[Operation], np.ndarray], Any],
) -> dict[tuple[int, int, int], Any]:
    """The units to time, by number of their first operation and positions on the grids of its axes."""
    full = graph.costs.sizes(graph.all_channels())
    calls = {}
    for number, operations in units.items():
        own = [axes[axis] for axis in axes_of[number] if axis >= 0]
        for i, j in np.ndindex(*(len(axis.grid) for axis in own), *[1] * (2 - len(own))):
            sizes = full.copy()
            for axis, position in zip(own, (i, j), strict=False):
                _resize(sizes, axis, axis.grid[position])
            calls[number, i, j] = make(operations, sizes)
    return calls


def _resize(sizes: np.ndarray, axis: Axis, width: float) -> None:
    """Set the extents of ``axis`` in ``sizes`` (int64 ``[E]``) to ``width``, in place."""
    if len(axis.extents) == 1:
        sizes[axis.extents[0]] = int(width)
        return
    for extent in axis.extents:
        sizes[extent] = max(1, round(sizes[extent] * width / axis.full))


def _time_calls(calls: Mapping[str, Call], stored: Cache, device: torch.device) -> None:
    """Time the calls that are not stored yet and store their times. Calls that fail are omitted."""
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
    operations: int, calls: Mapping[tuple[int, int, int], Any], seconds: Mapping[str, float]
) -> np.ndarray:
    """Nanoseconds, float64 ``[operations, POINTS, POINTS]``; shorter grids repeat their last entry.

    An op whose arguments name sizes may fail at some widths. Its time there is proportional to the number of
    elements that it reads. An op that fails at all widths counts as 0 ns.
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


def _last_positions(calls: Mapping[tuple[int, int, int], Any]) -> dict[int, tuple[int, int]]:
    """The last positions on the grids of each operation's axes."""
    last: dict[int, tuple[int, int]] = {}
    for number, i, j in calls:
        last[number] = max(last.get(number, (0, 0)), (i, j))
    return last
