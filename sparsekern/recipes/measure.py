"""Cost and speed of networks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekern._copying import copied

# Least seconds of a measurement; clock and scheduler dominate shorter ones.
SHORTEST = 0.02


def parameters(model: nn.Module) -> int:
    """Number of parameter elements; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for `example`, counted on the meta device."""
    shadow = copied(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(example.to("meta"))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def latency(models: Mapping[str, nn.Module], example: Tensor, rounds: int = 11) -> dict[str, float]:
    """Median seconds of a forward pass of each model.

    The models are left in evaluation mode. They take turns in every round, so that a slow phase of the
    machine affects all of them.
    """
    repeats = {}
    for name, model in models.items():
        model.eval()
        model(example)  # the first pass allocates and lets oneDNN choose its kernels
        begin = perf_counter()
        model(example)
        repeats[name] = max(1, round(SHORTEST / (perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            begin = perf_counter()
            for _ in range(repeats[name]):
                model(example)
            times[name].append((perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}
