"""Milliseconds of networks in every installed runtime."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.graph.capture.courses import first_line
from sparsekern.runtimes import Runtime
from sparsekern.runtimes.prepare import prepare

# Networks take turns for ROUNDS rounds; each turn runs for SHORTEST seconds, as clock and scheduler dominate
# shorter ones.
ROUNDS, SHORTEST = 7, 0.02


@dataclass(frozen=True)
class Speed:
    """The times of some networks in one runtime.

    Attributes:
        runtime: the runtime.
        batch: batch size.
        seconds: median seconds of a pass by name of the network; empty if one does not run.
        problem: why it does not run; empty if it does.
    """

    runtime: Runtime
    batch: int
    seconds: Mapping[str, float]
    problem: str = ""


def speeds(
    networks: Mapping[str, nn.Module],
    image: Tensor,
    runtimes: Sequence[Runtime],
    batches: Sequence[int],
) -> Iterator[Speed]:
    """Time networks in runtimes with torch's number of threads; they take turns, so that all suffer alike.

    Args:
        networks: networks by name, in evaluation mode, on the CPU.
        image: an input ``[1, ...]``.
        runtimes: the runtimes.
        batches: batch sizes.

    Yields:
        The times in one runtime at one batch size.
    """
    for batch in batches:
        inputs = image.expand(batch, *image.shape[1:]).contiguous()
        for runtime in runtimes:
            try:
                with torch.no_grad():
                    runs = {
                        name: prepare(network, (inputs,), {}, runtime, torch.get_num_threads())
                        for name, network in networks.items()
                    }
                    yield Speed(runtime, batch, in_turns(runs, ROUNDS))
            except Exception as error:
                # Exporters and compilers raise errors of many classes.
                yield Speed(runtime, batch, {}, first_line(error))


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each function, over ``rounds`` turns."""
    repeats = {}
    for name, run in runs.items():
        run()  # the first pass allocates, and runtimes choose their kernels
        begin = perf_counter()
        run()
        repeats[name] = max(1, round(SHORTEST / max(perf_counter() - begin, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((perf_counter() - begin) / repeats[name])
    return {name: statistics.median(own) for name, own in times.items()}
