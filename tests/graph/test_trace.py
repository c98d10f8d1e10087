"""Tracing: what it accepts, what it refuses, and that it leaves everything as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsekern.graph import register_rule, trace


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.second(self.drop(self.norm(self.first(x)).relu()))
        return self.head(x.mean((2, 3)) * scale)


X = torch.zeros(2, 3, 8, 8)


def state(model: nn.Module) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {
            n: (id(t), t.data_ptr(), t.stride(), t.requires_grad, t.grad, t._version, t.sum().item())
            for n, t in tensors.items()
        },
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def test_leaves_model_and_random_state_alone() -> None:
    model = Small().to(memory_format=torch.channels_last)
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    model.first.register_forward_hook(lambda module, args, output: output * 1)
    before = state(model)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    grad = torch.is_grad_enabled()
    trace(model, X)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert np.random.get_state()[1].tolist() == generators[2]
    assert torch.is_grad_enabled() == grad


def test_is_deterministic() -> None:
    one, two = trace(Small(), X), trace(Small(), X)
    assert str(one) == str(two)
    for name, slots in one.tensors.items():
        for a, b in zip(slots.channels, two.tensors[name].channels, strict=True):
            assert (a is None and b is None) or np.array_equal(a, b)


@pytest.mark.parametrize("inputs", [X, (X,), [X], (X, 2.0)])
def test_inputs_as_tensor_or_arguments(inputs: object) -> None:
    assert trace(Small(), inputs).num_channels == 8 + 6  # type: ignore[arg-type]


def test_keyword_arguments() -> None:
    assert trace(Small(), X, example_kwargs={"scale": 2.0}).num_channels == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert trace(Small().to(dtype), X.to(dtype)).num_channels == 14


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts(context: type) -> None:
    model = Small()
    with context():
        assert trace(model, X).num_channels == 14


def test_compiled_model() -> None:
    graph = trace(torch.compile(Small()), X)  # type: ignore[arg-type]
    assert "first.weight" in graph.tensors


def test_batch_of_one_behind_a_global_pool() -> None:
    """A batch norm over one value cannot train; the trace doubles such a batch."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    assert trace(model, torch.zeros(1, 3, 4, 4)).num_channels == 8


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(2, 4, 8, 8), r"float32\[2, 4, 8, 8\]"),
        ((X, X, X), "Small.forward"),
        ((), "expected what Small.forward accepts in evaluation mode"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"int64\[2, 3, 8, 8\]"),
        ("image.png", "example_inputs: got str"),
        ({"x": X}, "example_inputs: got dict.* keyword arguments go into example_kwargs"),
    ],
)
def test_inputs_that_the_model_rejects(inputs: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        trace(Small(), inputs)  # type: ignore[arg-type]
    assert str(caught.value).startswith("example_inputs: ")


def test_not_a_module() -> None:
    with pytest.raises(ValueError, match="model: got function"):
        trace(lambda x: x, X)  # type: ignore[arg-type]


def test_uninitialised_model() -> None:
    with pytest.raises(ValueError, match="model: parameter 'weight' is not initialised"):
        trace(nn.LazyConv2d(4, 3), X)


def test_model_that_cannot_be_copied() -> None:
    model = Small()
    model.generator = (item for item in ())  # type: ignore[assignment]
    with pytest.raises(ValueError, match="model: Small cannot be copied"):
        trace(model, X)


@pytest.mark.parametrize(
    ("protect", "left"),
    [
        ("first", {"second"}),
        (["second.weight"], set()),
        (["second.bias"], {"first"}),
        ("nor*", {"second"}),
        (["*.weight"], set()),
        ("", set()),
    ],
)
def test_protected_by_name(protect: object, left: set[str]) -> None:
    graph = trace(Small(), X, protect=protect)  # type: ignore[arg-type]
    assert {group.name for group in graph.groups} == left


def test_protected_by_object() -> None:
    model = Small()
    assert [g.name for g in trace(model, X, protect=model.norm).groups] == ["second"]
    assert [g.name for g in trace(model, X, protect=[model.second.bias]).groups] == ["first"]
    graph = trace(model, X, protect=model.first)
    assert ("first.weight", "protected by the user") in graph.frozen
    assert "protected by the user" in graph.explain("first")


@pytest.mark.parametrize("protect", ["frist", ["first", "third.*"], nn.Linear(2, 2)])
def test_protecting_nothing_is_an_error(protect: object) -> None:
    with pytest.raises(ValueError, match="protect: .* matches nothing in Small"):
        trace(Small(), X, protect=protect)  # type: ignore[arg-type]


def test_protecting_an_object_of_another_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="protect: int matches nothing"):
        trace(Small(), X, protect=[3])  # type: ignore[list-item]


def test_tied_weights_are_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.one = nn.Conv2d(8, 8, 1, bias=False)
            self.two = nn.Conv2d(8, 8, 1, bias=False)
            self.two.weight = self.one.weight
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(self.stem(x))))

    graph = trace(Tied(), X)
    assert graph.tensors["one.weight"].aliases == ("two.weight",)
    assert "two.weight" not in graph.tensors
    assert graph.num_channels == 8
    assert graph.explain("two.weight")


def test_transposed_and_tied_weight_stays() -> None:
    """Rows along two dimensions cannot be masked by zeroing one of them."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 6)
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = nn.functional.linear(self.stem(x), self.weight)
            return self.head(nn.functional.linear(hidden, self.weight.t()))

    graph = trace(Autoencoder(), torch.zeros(2, 3))
    assert "weight" not in graph.tensors
    assert dict(graph.frozen)["weight"].startswith("weight makes channels along two dimensions")


def test_a_rule_of_ones_own() -> None:
    with torch.library._scoped_library("sparsekern_tests", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        library._register_fake("double", torch.empty_like)

        class Doubled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.two(torch.ops.sparsekern_tests.double(self.one(x)))

        graph = trace(Doubled(), X)
        assert graph.num_channels == 0
        assert "sparsekern_tests::double has no rule" in str(graph)
        register_rule("sparsekern_tests::double")(lambda call: call.make(call["x"].ids, call["x"].zero))
        assert trace(Doubled(), X).num_channels == 8
        with pytest.raises(ValueError, match="already has a rule"):
            register_rule("sparsekern_tests::double")(lambda call: call.give_up(""))
