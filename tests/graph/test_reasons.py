"""Every dimension of every parameter is in a group, or has a reason that ``explain`` and ``print`` give."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import graph.random_steps
import graph.value_structures  # noqa: F401
import pytest
import torch
from graph.random_heads import HEADS
from graph.random_networks import build, random_plan
from graph.structures import STRUCTURES, Net
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrizations, parametrize

from sparsekern.graph import ChannelGraph, trace

X = torch.rand(2, 3, 8, 8)
VAGUE = ("", "no layer makes or reads channels along it")


class Plain(nn.Module):
    """Two convolutions and a head, each of the former changed by ``wrap``."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.first = wrap(nn.Conv2d(3, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8)
        self.second = wrap(nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Conv2d(8, 2, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.scalar = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).relu()
        return self.head(self.second(y).relu()) * self.scalar


class FakeQuantised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(weight, 0.1, 0, -128, 127)


class FakeQuantisedByChannel(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero_point, 0, -128, 127)


def quantised(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", FakeQuantised())


def quantised_by_channel(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", FakeQuantisedByChannel(8))


def prepared() -> nn.Module:
    model = Plain().train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model)


def check_reasons(model: nn.Module, graph: ChannelGraph) -> None:
    text = str(graph)
    listed = dict(graph.frozen)
    for name, parameter in model.named_parameters():
        lines = graph.explain(name).splitlines()
        assert lines, name
        for dim, size in enumerate(parameter.shape):
            of_dim = [line for line in lines if line.startswith(f"{name}, dim {dim}: ")]
            assert of_dim or size == 1, f"{name}, dim {dim}"
            reasons = [line.partition(" stay: ")[2] for line in of_dim if " stay: " in line]
            assert all(reason.strip() for reason in reasons)
        if name not in graph.tensors:
            assert listed[name] not in VAGUE, name
            # Layers of one kind share a line, without the layer's name.
            assert re.sub(r" in [\w.]+", "", listed[name], count=1) in text or "more" in text


WRAPS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (parametrizations.weight_norm, "_weight_norm in first.* divides rows by their norm"),
    "weight_norm, hook": (nn.utils.weight_norm, "_weight_norm in first divides rows by their norm"),
    "spectral_norm": (parametrizations.spectral_norm, "flatten in second.*"),
    "spectral_norm, hook": (nn.utils.spectral_norm, "reshape in second.*"),
    "orthogonal": (parametrizations.orthogonal, "tril in first.*"),
    "quantised": (quantised, "fake_quantize_per_tensor_affine in first.* has no rule"),
    "quantised by channel": (quantised_by_channel, "fake_quantize_per_channel_affine in first.* has no rule"),
}


@pytest.mark.parametrize("name", WRAPS)
def test_of_weights_that_are_computed(name: str) -> None:
    wrap, reason = WRAPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Plain(wrap)
    graph = trace(model, X)
    check_reasons(model, graph)
    weight = next(n for n, p in model.first.named_parameters() if p.ndim == 4 and p.shape[1] == 3)
    assert re.search(reason, graph.explain(f"first.{weight}"))
    assert re.search(reason, graph.explain("first"))
    # A layer's output stays because of that layer, not because of the layer's input.
    assert "input" not in graph.explain("norm.weight")


def test_of_a_model_prepared_for_quantisation() -> None:
    model = prepared()
    graph = trace(model, X)
    check_reasons(model, graph)
    assert "has no rule" in graph.explain("first.weight")


def test_of_what_nothing_reads() -> None:
    model = Plain()
    graph = trace(model, X)
    check_reasons(model, graph)
    assert graph.explain("unused.weight").splitlines()[0] == (
        "unused.weight, dim 0: 4 stay: the forward does not read it"
    )
    assert graph.explain("scalar") == "scalar: stays: has a single element in every dimension"
    assert graph.explain("norm.num_batches_tracked")


@pytest.mark.parametrize("name", sorted(STRUCTURES)[::6])
def test_of_structures(name: str) -> None:
    model = Net(STRUCTURES[name])
    check_reasons(model, trace(model, X))


@pytest.mark.parametrize("seed", [1, 2])
def test_of_random_networks(seed: int) -> None:
    model, inputs = build(random_plan(seed), HEADS)
    check_reasons(model, trace(model, inputs))
