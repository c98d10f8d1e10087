from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekern.compact import verify


class Gives(nn.Module):
    """Passes a tensor through a function; the random part tells training from evaluation."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.drop(x))


@dataclass
class Prediction:
    mask: Tensor
    note: str


Pair = namedtuple("Pair", "first second")

STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "dict": lambda x: {"out": x, "none": None},
    "list": lambda x: [x, -x],
    "tuple": lambda x: (x, (x, 2)),
    "namedtuple": lambda x: Pair(x, [x]),
    "dataclass": lambda x: Prediction(x, "note"),
    "nested": lambda x: {"a": [Prediction(x, "note"), {"b": (x,)}]},
}

INPUT = torch.tensor([1.0, -4.0, 2.0])


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_difference_is_found_in_every_structure(structure: Callable[[Tensor], Any]) -> None:
    model = Gives(structure)
    assert verify(model, Gives(structure), INPUT) == 0
    shifted = Gives(lambda x: structure(x + torch.tensor([0.0, 0.0, 0.5])))
    assert verify(model, shifted, (INPUT,)) == 0.5 / 4


def test_modes_come_back_module_by_module() -> None:
    model, small = Gives(STRUCTURES["tensor"]), Gives(STRUCTURES["tensor"])
    model.train()
    model.drop.eval()
    small.eval()
    small.drop.train()
    verify(model, small, [INPUT])
    assert (model.training, model.drop.training) == (True, False)
    assert (small.training, small.drop.training) == (False, True)


def test_modes_come_back_after_an_error() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("inside")

    model = Gives(fail)
    with pytest.raises(KeyError, match="inside"):
        verify(model, model, INPUT)
    assert model.training
    assert model.drop.training


def test_random_state_stays_and_both_see_the_same() -> None:
    model = Gives(lambda x: x * torch.rand(3))
    before = torch.get_rng_state()
    assert verify(model, model, INPUT) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_keyword_arguments_are_passed() -> None:
    class Scale(nn.Module):
        def forward(self, x: Tensor, *, by: Tensor) -> Tensor:
            return x * by

    assert verify(Scale(), Scale(), INPUT, example_kwargs={"by": INPUT}) == 0


def test_every_tensor_has_its_own_scale() -> None:
    model = Gives(lambda x: (1e6 * x, x))
    small = Gives(lambda x: (1e6 * x, x + 1))
    assert verify(model, small, INPUT) == 0.25


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_equals_itself_only(value: float) -> None:
    broken = Gives(lambda x: torch.where(x > 0, value, x))
    assert verify(broken, broken, INPUT) == 0
    assert verify(Gives(STRUCTURES["tensor"]), broken, INPUT) == math.inf
    assert verify(broken, Gives(STRUCTURES["tensor"]), INPUT) == math.inf


def test_half_precision_is_compared_exactly() -> None:
    model = Gives(lambda x: (x * 64).bfloat16())
    small = Gives(lambda x: (x * 64).float() + 2**-10)
    assert verify(model, small, INPUT) == 2**-18


def test_nothing_against_something_is_infinite() -> None:
    assert verify(Gives(lambda x: 0 * x), Gives(lambda x: x), INPUT) == math.inf
    assert verify(Gives(lambda x: (x, "a")), Gives(lambda x: (x, "b")), INPUT) == math.inf


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (lambda x: x, lambda x: (x,), r"1 values, expected 1 .*output\[0\]"),
        (lambda x: {"a": x}, lambda x: {"b": x}, r"output\['a'\], output\['b'\]"),
        (lambda x: [x, x], lambda x: [x], r"output\[1\]"),
        (lambda x: x, lambda x: x[:2], r"got shape \[2\] of output, expected \[3\]"),
        (lambda x: [x], lambda x: [None], r"got NoneType as output\[0\], expected Tensor"),
        (lambda x: object(), lambda x: object(), "model: got object as output, expected tensors"),
        (lambda x: [], lambda x: [], "model: got an empty output"),
    ],
)
def test_different_structures_are_refused(one: Any, other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(Gives(one), Gives(other), INPUT)
