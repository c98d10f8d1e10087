"""Models that have been run: what they computed from their weights and kept is computed anew in a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph.exactness import check
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsekern.graph import trace

X = torch.rand(2, 5, 16)


class Biased(nn.Module):
    """Attention over tokens with a bias for each head, which evaluation mode keeps (as LeViT does)."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 6)
        self.bias = nn.Parameter(torch.rand(heads, 9))
        self.register_buffer("index", torch.arange(25).reshape(5, 5) % 9)
        self.cache: Any = {}

    def train(self, mode: bool = True) -> Biased:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def biases(self) -> Tensor:
        if self.training:
            return self.bias[:, self.index]
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[:, self.index]
        return self.cache["bias"]

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * 0.5 + self.biases()).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


class AsAttribute(Biased):
    def biases(self) -> Tensor:
        if self.cache is None or not isinstance(self.cache, Tensor) or self.training:
            self.cache = self.bias[:, self.index]
        return self.cache


@pytest.mark.parametrize("make", [Biased, AsAttribute])
def test_a_cache_follows_its_weight_after_a_run(make: Callable[[], Biased]) -> None:
    fresh, ran = make().eval(), make().eval()
    with torch.no_grad():
        ran(X)
    kept = ran.cache
    graph = trace(ran, X)
    assert ran.cache is kept
    assert graph.num_channels == trace(fresh, X).num_channels
    assert {name: slots.channels for name, slots in graph.tensors.items()}.keys() == set(
        trace(fresh, X).tensors
    )


def test_a_model_with_a_filled_cache_is_compacted() -> None:
    model = Biased().double().eval()
    with torch.no_grad():
        model(X.double())
    check(model, (X,))


def test_results_that_functions_remember_are_apart() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(16, 8), nn.Linear(8, 2)
            self.positions = functools.lru_cache(maxsize=2)(self.make)

        @staticmethod
        @functools.cache
        def scale(size: int) -> Tensor:
            return torch.full((size,), 2.0)

        def make(self, size: int) -> Tensor:
            return self.first.weight.new_ones(size).cumsum(0)

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[1]
            y = self.first(x) * self.positions(length)[:, None] * self.scale(length)[:, None]
            return self.head(y.relu())

    model = Remembering()
    for _ in range(2):
        assert trace(model, X).num_channels == 8
        for remembered in (model.positions(5), model.scale(5)):
            assert not isinstance(remembered, FakeTensor)
        model(X)


@functools.cache
def unrelated() -> object:
    """A result that no forward asks for."""
    return object()


def test_results_of_other_functions_stay() -> None:
    before = unrelated()
    trace(Biased(), X)
    assert unrelated() is before
