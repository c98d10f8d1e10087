"""A network and lists that are small enough for tests and replace the measured ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsekern.bench import networks, norm
from sparsekern.bench.cases import Case
from sparsekern.bench.suite import Suite


class Small(nn.Module):
    """A convolution, a depthwise one and a transposed one with norms between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.second = nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.second(self.depthwise(x)).relu()
        return self.last(self.up(x).relu())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network that cases can have in this test."""
    monkeypatch.setitem(networks.NETWORKS, "small", networks.Network(Small, edge=8))
    monkeypatch.setitem(networks.SHAPES, "few", ((4,),) * 5)
    monkeypatch.setitem(norm.LAYERS, "small", norm.Data((2, 6, 5, 7)))
    return "small"


def suite(placements: int = 1, rounds: int = 2) -> Suite:
    """A suite that takes no time."""
    return Suite(placements, rounds, shortest=0.0, elements=1000)


def case(op: str, **options: object) -> Case:
    """A case of the small network."""
    return Case(op, **{"tensors": "small"} | options)  # type: ignore[arg-type]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
