"""The step inside the backward pass against ``step()`` after it: peak memory and time of an iteration.

    python -m benchmarks.in_backward

One thread. Memory is what torch's profiler sees allocated and freed during one iteration, above parameters,
optimizer state and the activations at the end of the forward pass; time is the median of interleaved
iterations.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import environment
from benchmarks.networks import NETWORKS
from sparsekern import Pruner, optim

CASES = (("unet-31m", 64), ("unet-31m", 128), ("resnet50", 128))
ROUNDS = 7


@dataclass
class Candidate:
    """One model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    example: Tensor
    seconds: list[float]

    @classmethod
    def make(cls, name: str, size: int, *, inside: bool) -> Candidate:
        torch.manual_seed(0)
        model = NETWORKS[name]()
        optimizer = optim.AdamW(model.parameters(), lr=1e-3)
        example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        # A pruner without an event in the measured iterations.
        Pruner(model, optimizer, example, keep=0.5, steps=10_000)
        if inside:
            optim.in_backward(optimizer)
        return cls(model, optimizer, example, [])

    def iterate(self) -> None:
        self.model(self.example).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> None:
        start = time.perf_counter()
        self.iterate()
        self.seconds.append(time.perf_counter() - start)

    def peak(self) -> int:
        """Peak bytes of an iteration above parameters, state and activations."""
        with _profiled() as forward:
            output = self.model(self.example).square().mean()
        activations = _allocated(forward)[-1]
        del output
        with _profiled() as iteration:
            self.iterate()
        return max(_allocated(iteration)) - activations


def _profiled() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _allocated(run: profile) -> list[int]:
    """Bytes allocated minus freed since the beginning, after every change."""
    assert run.profiler is not None and run.profiler.kineto_results is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return list(itertools.accumulate(changes, initial=0))


def measure(name: str, size: int) -> dict[str, float]:
    candidates = {inside: Candidate.make(name, size, inside=inside) for inside in (False, True)}
    for candidate in candidates.values():
        candidate.iterate()
        candidate.iterate()
    for _ in range(ROUNDS):
        for candidate in candidates.values():
            candidate.timed()
    peaks = {inside: candidate.peak() for inside, candidate in candidates.items()}
    return {
        "step_mib": peaks[False] / 2**20,
        "in_backward_mib": peaks[True] / 2**20,
        "memory_ratio": peaks[True] / peaks[False],
        "step_ms": median(candidates[False].seconds) * 1e3,
        "in_backward_ms": median(candidates[True].seconds) * 1e3,
        "time_ratio": median(
            b / a for a, b in zip(candidates[False].seconds, candidates[True].seconds, strict=True)
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    console = Console()
    columns = ("MiB, step()", "MiB, in backward", "ratio", "ms, step()", "ms, in backward", "ratio")
    table = Table("input", "network", *columns)
    for name, size in CASES:
        row = measure(name, size)
        figures = [f"{value:.3f}" if "ratio" in key else f"{value:.1f}" for key, value in row.items()]
        table.add_row(f"2x3x{size}x{size}", name, *figures)
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    main()
