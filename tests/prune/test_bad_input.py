"""Wrong input raises one error with the argument, its value and the expected one; nothing changes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import Plain, batch, train
from torch import Tensor, nn

import sparsekern
from sparsekern import Pruner
from sparsekern.prune.decide.budget import round_to_choices
from sparsekern.prune.state.statistics import Statistics


def build(model: nn.Module | None = None, **changes: object) -> Pruner:
    model = model or Plain()
    optimizer = changes.pop("optimizer", None) or sparsekern.optim.AdamW(model.parameters())
    inputs = changes.pop("example_inputs", batch(0))
    options: dict = {"keep": 0.5, "steps": 100}
    return Pruner(model, optimizer, inputs, **(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0, -0.1, 1.5, float("nan"), "half", None, True])
def test_keep_outside_its_range(keep: object) -> None:
    with pytest.raises(ValueError, match=r"^keep: got .* in \(0, 1\]"):
        build(keep=keep)


def test_keep_below_the_floors_names_the_smallest_possible() -> None:
    with pytest.raises(ValueError, match=r"^keep: got 0.01 of macs, expected at least (0\.\d+)") as error:
        build(keep=0.01, min_channels=8)
    smallest = float(str(error.value).split("at least ")[1].split(",")[0])
    assert build(keep=smallest, min_channels=8).metrics()["macs_share"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "seconds"}, "^of: got 'seconds'"),
        ({"steps": 0}, "^steps: got 0"),
        ({"select": "nowhere"}, "^select: got 'nowhere', expected names joined by .*: joint, gradient-count"),
        ({"allocate": 3}, "^allocate: got 3"),
        ({"penalty": -1}, "^penalty: got -1"),
        ({"nonfinite": "panic"}, "^nonfinite: got 'panic'"),
        ({"round_to": 0}, "^round_to: got 0"),
        ({"min_channels": 0}, "^min_channels: got 0"),
        ({"min_channels": "3"}, "^min_channels: got '3', expected a whole number >= 1, or"),
        ({"min_channels": None}, "^min_channels: got None, expected a whole number >= 1, or"),
        ({"min_channels": {3: 3}}, "^min_channels: got {3: 3}, expected"),
        (
            {"also": nn.Sequential(nn.Conv2d(3, 8, 3))},
            "^also: got a Sequential, expected a sequence of modules",
        ),
        ({"warmup": "0.1"}, "^warmup: got '0.1'"),
        ({"events": True}, "^events: got True"),
        ({"min_channels": {"nowhere": 3}}, "^min_channels: got 'nowhere', which matches no group"),
        ({"protect": ["nowhere"]}, "nowhere"),
        ({"example_inputs": torch.zeros(1, 5, 8, 8)}, "^example_inputs: "),
        ({"example_inputs": "image"}, "^example_inputs: "),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build(**changes)


def test_a_model_without_prunable_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(dim=1))
    with pytest.raises(ValueError, match="^model: got a Sequential without a channel that can be removed"):
        build(model)


def test_trainable_parameters_that_the_optimizer_does_not_hold() -> None:
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.stem.parameters())
    with pytest.raises(ValueError, match=r"^optimizer: got one without \d+ trainable parameters .*body"):
        build(model, optimizer=optimizer)


def test_a_failed_construction_leaves_the_optimizer_alone() -> None:
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="^keep"):
        build(model, optimizer=optimizer, keep=1e-6)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    train(model, optimizer, range(3))


def nan_gradient(model: nn.Module) -> None:
    model(batch(0)).square().mean().backward()
    model.stem[0].weight.grad[3, 0, 0, 0] = float("nan")  # type: ignore[index]


def test_a_nan_gradient_is_raised_before_anything_changes() -> None:
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters())
    build(model, optimizer=optimizer, nonfinite="raise")
    nan_gradient(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match=r"got NaN or infinity in stem\.0\.weight"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not optimizer.state


@pytest.mark.parametrize("make", [sparsekern.optim.AdamW, torch.optim.AdamW, torch.optim.LBFGS])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_nan_gradient_of_the_closure_is_raised_before_anything_changes(make: Any, by_name: bool) -> None:
    model = Plain()
    optimizer = make(model.parameters())
    pruner = build(model, optimizer=optimizer, nonfinite="raise")

    def closure() -> float:
        optimizer.zero_grad()
        nan_gradient(model)
        return 0.0

    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    rows = pruner.state_dict()["rows"]
    with pytest.raises(FloatingPointError, match=r"got NaN or infinity in stem\.0\.weight"):
        optimizer.step(**{"closure": closure}) if by_name else optimizer.step(closure)
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
    assert all(
        torch.equal(torch.as_tensor(rows[k]), torch.as_tensor(v))
        for k, v in pruner.state_dict()["rows"].items()
    )


@pytest.mark.parametrize("make", [sparsekern.optim.AdamW, torch.optim.AdamW])
def test_gradients_from_before_the_closure_do_not_matter(make: Any) -> None:
    model = Plain()
    optimizer = make(model.parameters())
    pruner = build(model, optimizer=optimizer, nonfinite="raise")
    nan_gradient(model)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean()
        loss.backward()
        return loss

    assert torch.isfinite(optimizer.step(closure))
    assert pruner.metrics()["nonfinite"] == 0


def test_a_nan_gradient_never_enters_the_statistics() -> None:
    model = Plain()
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=0.0 + 1e-9)
    pruner = build(model, optimizer=optimizer, steps=20, warmup=0.3, finish=0.9)
    for _ in range(5):
        nan_gradient(model)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            # What torch's update made of it; the statistics are what is tested here.
            model.stem[0].weight.nan_to_num_()
    nan_gradient(model)
    with pytest.warns(UserWarning, match=r"^gradient: got NaN or infinity in \d+ rows"):
        optimizer.step()
    assert pruner.metrics()["nonfinite"] == 6
    table = pruner._network.rows.table
    assert all(bool(torch.isfinite(array).all()) for array in (table.activity, table.channel_dot_sq))


class Broken(sparsekern.criteria.Criterion):
    def __call__(self, statistics: Statistics) -> np.ndarray:
        return np.full(statistics.graph.num_channels, np.nan)


def test_a_criterion_that_gives_nonsense_is_named() -> None:
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters())
    build(model, optimizer=optimizer, select=Broken(), steps=10)
    with pytest.raises(ValueError, match="^select: got saliencies .* not finite from .*Broken"):
        train(model, optimizer, range(10))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Plain()
        self.phase = nn.Parameter(torch.zeros(1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.phase.real


def test_complex_parameters_are_refused_by_the_step() -> None:
    model = Complex()
    optimizer = sparsekern.optim.AdamW(model.parameters())
    model(batch(0)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, TypeError, ValueError), match="complex"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_rounding_on_a_gpu_does_not_depend_on_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    """Under autocast they are float32, and the tensor cores get 16-bit data."""
    on_gpu = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"), dtype=dtype)])
    )
    assert round_to_choices("auto", on_gpu, shrink=False) == (8, 4, 1)  # type: ignore[arg-type]
    assert round_to_choices("auto", nn.Linear(2, 2, dtype=dtype), shrink=False) == (16, 8, 4, 1)


def test_auto_rounding_falls_back_where_the_network_is_narrow() -> None:
    """With widths of 16, 32 and 16, multiples of 16 leave too many channels, and smaller multiples do not."""
    chosen = {
        keep: build(keep=keep, shrink=True)._settings.policy.round_to for keep in (0.6, 0.3, 0.12, 0.02)
    }
    assert chosen == {0.6: 16, 0.3: 8, 0.12: 4, 0.02: 1}
    assert build(keep=0.3, round_to="auto")._settings.policy.round_to == 8
    with pytest.raises(ValueError, match=r"^keep: got 0.3 of macs, expected at least .*round_to=16"):
        build(keep=0.3, shrink=True, round_to=16)
    with pytest.raises(ValueError, match=r"^keep: got 1e-06 .*round_to=1\b"):
        build(keep=1e-6, shrink=True)
    model = Plain().eval()
    once = sparsekern.prune_once(
        model, batch(0), keep=0.3, select=sparsekern.criteria.Magnitude(), round_to="auto"
    )
    widths = [m.out_channels for m in once.network.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths) and widths != [16, 32, 16]
