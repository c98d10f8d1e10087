from __future__ import annotations

import time

import torch
from torch import nn

from sparsekern.recipes.measure import latency, macs, parameters


def test_macs_and_parameters_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    assert macs(model, torch.zeros(1, 3, 10, 12)) == 10 * 12 * (3 * 8 * 9 + 8 * 2)
    assert parameters(model) == 3 * 8 * 9 + 8 + 16 + 8 * 2 + 2
    assert next(model.parameters()).device.type == "cpu" and model.training


class Sleeper(nn.Module):
    def __init__(self, seconds: float, log: list[float]) -> None:
        super().__init__()
        self.seconds, self.log = seconds, log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(self.seconds)
        time.sleep(self.seconds)
        return x


def test_latency_is_the_time_of_one_pass_and_models_take_turns():
    log: list[float] = []
    models = {"slow": Sleeper(0.03, log), "fast": Sleeper(0.004, log)}
    found = latency(models, torch.zeros(1), rounds=3)
    assert 0.03 <= found["slow"] < 0.06 and 0.004 <= found["fast"] < 0.02
    timed = log[4:]
    turns = [seconds for seconds, before in zip(timed, [None, *timed], strict=False) if seconds != before]
    assert turns == [0.03, 0.004] * 3
