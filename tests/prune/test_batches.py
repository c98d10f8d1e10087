"""Batches in the usual forms of data loaders, for prune_once, recalibrate and forecast."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from prune.networks import Plain, batch
from prune.test_once import LOSS, TARGETS, calibration, example, trained
from torch import Tensor, nn

import sparsekern
from sparsekern import Pruner, criteria, prune_once
from sparsekern.prune.calibration import moved


class Named(NamedTuple):
    image: Tensor
    label: Tensor
    name: str


@dataclass(frozen=True)
class Record:
    image: Tensor
    label: Tensor


class Encoding(UserDict):  # type: ignore[type-arg]
    """The output of a tokenizer: a mapping that is no dict and has a method ``to``."""

    def to(self, device: torch.device) -> Encoding:
        return Encoding({name: value.to(device) for name, value in self.items()})


FORMS: dict[str, Any] = {
    "dicts": (
        lambda x, y: {"image": x, "label": y, "path": ["a"] * 4},
        lambda m, b: LOSS(m(b["image"]), b["label"]),
    ),
    "named tuples": (lambda x, y: Named(x, y, "a"), lambda m, b: LOSS(m(b.image), b.label)),
    "dataclasses": (lambda x, y: Record(x, y), lambda m, b: LOSS(m(b.image), b.label)),
    "mappings": (lambda x, y: Encoding(x=x, y=y), lambda m, b: LOSS(m(b["x"]), b["y"])),
    "lists of samples": (
        lambda x, y: [{"image": one, "label": label} for one, label in zip(x, y, strict=True)],
        lambda m, b: LOSS(m(torch.stack([s["image"] for s in b])), torch.stack([s["label"] for s in b])),
    ),
    "pairs": (lambda x, y: (x, y), lambda m, b: LOSS(m(b[0]), b[1])),
}


@pytest.mark.parametrize("select", [None, criteria.Magnitude()])
@pytest.mark.parametrize(("form", "forward_loss"), FORMS.values(), ids=FORMS)
def test_prune_once_takes_them(form: Any, forward_loss: Any, select: criteria.Criterion | None) -> None:
    given = [form(x, y) for x, y in calibration()]
    found = prune_once(
        trained(), example(), keep=0.4, select=select, calibration=given, forward_loss=forward_loss
    )
    expected = prune_once(trained(), example(), keep=0.4, select=select, calibration=calibration(), loss=LOSS)
    assert found.plan == expected.plan
    for name, value in expected.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value), name


@pytest.mark.parametrize(("form", "forward_loss"), FORMS.values(), ids=FORMS)
def test_recalibrate_takes_them(form: Any, forward_loss: Any) -> None:
    ours, theirs = trained(), trained()
    used = sparsekern.recalibrate(ours, [form(x, y) for x, y in calibration()], forward_loss=forward_loss)
    assert used == sparsekern.recalibrate(theirs, [x for x, _ in calibration()]) == 4
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize(("form", "forward_loss"), FORMS.values(), ids=FORMS)
def test_moves_tensors_and_leaves_the_rest(form: Any, forward_loss: Any) -> None:
    given = form(batch(0), TARGETS)
    there = moved(given, torch.device("meta"))
    assert type(there) is type(given)
    assert forward_loss(nn.Flatten(), moved(given, torch.device("cpu"))) > 0
    assert forward_loss(nn.Flatten(), there).device.type == "meta"
    assert forward_loss(nn.Flatten(), given).device.type == "cpu"


def small_pruner() -> Pruner:
    model = Plain()
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=0.01)
    return Pruner(model, optimizer, batch(0), keep=0.5, steps=40, events=2, shrink=True)


def test_forecast_takes_them() -> None:
    pruner, calls = small_pruner(), 0

    def forward_loss(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return LOSS(model(sample["image"]), sample["label"])

    found = pruner.forecast(measure={"image": batch(0), "label": TARGETS}, forward_loss=forward_loss)
    assert found.seconds is not None and calls > 4
    assert pruner.forecast(measure={"x": batch(0)}).seconds is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": LOSS, "forward_loss": lambda m, b: m(b[0]).sum()},
            "^forward_loss: got a function as well as loss",
        ),
        ({"forward_loss": 3}, "^forward_loss: got int, expected a function"),
        ({"loss": "mse"}, "^loss: got str, expected a function"),
        ({}, "^loss: got None, expected a function, or forward_loss"),
        (
            {"calibration": None, "forward_loss": lambda m, b: m(b[0]).sum()},
            "^calibration: got None with forw",
        ),
        (
            {"calibration": [{"image": 1, "label": 2}], "loss": LOSS},
            "^calibration: got a batch with inputs of type dict with image, label, which the model does not",
        ),
        (
            {"calibration": [{"image": 1, "label": 2}], "select": criteria.Magnitude()},
            "^calibration: got a batch with inputs of type dict with image, label, which the model does not",
        ),
        (
            {"calibration": [(batch(0), TARGETS, 3)], "loss": LOSS},
            r"^calibration: got a batch with inputs of type tuple, .*forward_loss\(model, batch\) for "
            r"batches",
        ),
        ({"forward_loss": lambda m, b: m(b[0])}, "^loss: got Tensor"),
    ],
)
def test_combinations_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"keep": 0.4, "calibration": calibration()} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        prune_once(trained(), example(), **options)


@pytest.mark.parametrize("measure", [True, False, None, lambda model: model(batch(0)).sum()])
def test_forecast_wants_a_batch_for_forward_loss(measure: Any) -> None:
    with pytest.raises(ValueError, match="^measure: got .*with forward_loss, expected a batch"):
        small_pruner().forecast(measure=measure, forward_loss=lambda model, sample: model(sample).sum())


def test_a_batch_that_fails_leaves_the_statistics_as_they_were() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="^batches: got a batch with inputs of type dict with image"):
        sparsekern.recalibrate(model, [example(), {"image": example()}])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not model.training
