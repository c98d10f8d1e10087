"""Pruning a trained network in one go."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import Plain, Residual, batch
from torch import Tensor, nn

import sparsekern
from sparsekern import Pruner, criteria, prune_once
from sparsekern.graph import trace

TARGETS = torch.arange(4) % 4
CALIBRATION = [(batch(seed), TARGETS) for seed in range(4)]
LOSS = nn.CrossEntropyLoss()


def trained(network: type[nn.Module] = Plain, **options: Any) -> nn.Module:
    """A network in evaluation mode whose norms have running statistics of data."""
    torch.manual_seed(0)
    model = network(**options).double().train()
    for seed in range(4):
        model(batch(seed, dtype=torch.float64))
    return model.eval()


def calibration(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(batch(seed, dtype=torch.float64), TARGETS) for seed in range(count)]


def example() -> Tensor:
    return batch(0, dtype=torch.float64)


@pytest.mark.parametrize("select", [None, criteria.Taylor(), criteria.GradientCount(), criteria.Magnitude()])
@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_network_is_that_of_its_plan(select: criteria.Criterion | None, of: str) -> None:
    model = trained()
    network, plan = prune_once(
        model,
        example(),
        keep=0.3,
        of=of,
        select=select,
        calibration=calibration(),
        loss=LOSS,
        fold=False,
        recalibrate=False,
    )
    assert sparsekern.verify(sparsekern.compact(model, plan), network, batch(9, dtype=torch.float64)) == 0
    ours = trace(network, example())
    dense = trace(model, example())
    costs = [getattr(g.cost(np.ones(g.num_channels, bool)), of) for g in (ours, dense)]
    assert 0.2 < costs[0] / costs[1] <= 0.3
    assert type(network) is type(model)


class Scaled(nn.Module):
    """A network with a required keyword input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.two(self.one(x).relu() * scale)


def test_keyword_inputs(tmp_path: Path) -> None:
    model, x, given = Scaled(), torch.randn(4, 3), {"scale": torch.tensor(2.0)}
    for of, keep in (("macs", 0.5), ("latency", 1.0)):
        pruned = prune_once(
            model, x, example_kwargs=given, keep=keep, of=of, select=criteria.Magnitude(), cache=tmp_path
        )
        assert pruned.network(x, **given).shape == (4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, optimizer, x, example_kwargs=given, keep=0.5, steps=40, shrink=True, round_to=1)
    assert pruner.forecast(measure=True).pruner_seconds > 0
    with pytest.raises(ValueError, match="example_inputs: "):
        prune_once(model, x, keep=0.5, select=criteria.Magnitude())


def test_the_model_is_left_as_it_was() -> None:
    model = trained().train()
    model.body.eval()
    model.stem.requires_grad_(False)
    model(batch(5, dtype=torch.float64)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    random.seed(3)
    np.random.seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()

    def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in torch.randperm(4).tolist():
            random.random()
            np.random.rand()
            yield batch(seed, dtype=torch.float64), TARGETS

    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return shuffled()

    network, _ = prune_once(model, example(), keep=0.4, calibration=Loader(), loss=LOSS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, p in model.named_parameters():
        before = grads[name]
        assert (p.grad is None) == (before is None)
        assert before is None or torch.equal(p.grad, before)
    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.random.get_rng_state(), states[2])
    # The network takes after the model.
    assert network.training and not network.body.training
    assert not network.stem[0].weight.requires_grad and network.body[0].weight.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_taylor_is_the_mean_square_over_the_batches() -> None:
    model = trained()
    seen: list[np.ndarray] = []

    class Spy(criteria.Taylor):
        def __call__(self, statistics: Any) -> np.ndarray:
            seen.append(statistics.taylor)
            assert 0 < statistics.activity.max() <= 1
            return statistics.taylor

    prune_once(model, example(), keep=0.5, select=Spy(), calibration=calibration(), loss=LOSS)
    graph = trace(model, example())
    squares = []
    for inputs, targets in calibration():
        model.zero_grad()
        LOSS(model(inputs), targets).backward()
        dot = np.zeros(graph.num_channels)
        parameters = dict(model.named_parameters())
        for channel in range(graph.num_channels):
            for entry in range(*graph.gates.offsets[channel : channel + 2]):
                p = parameters[graph.gates.names[graph.gates.tensors[entry]]]
                row = graph.gates.rows[entry]
                dot[channel] += float((p.detach()[row] * p.grad[row]).sum())
        squares.append(dot**2)
    np.testing.assert_allclose(seen[0], np.sqrt(np.mean(squares, axis=0)), rtol=2e-3)


def test_one_batch_counts_gradients_too() -> None:
    seen: list[np.ndarray] = []

    class Spy(criteria.GradientCount):
        def __call__(self, statistics: Any) -> np.ndarray:
            seen.append(statistics.activity)
            return super().__call__(statistics)

    prune_once(trained(), example(), keep=0.5, select=Spy(), calibration=calibration(1), loss=LOSS)
    assert 0 < seen[0].mean() < 1


def test_duplicates_are_folded() -> None:
    model = trained()
    with torch.no_grad():
        for copied, source in ((1, 0), (3, 2), (5, 4)):
            for p in (model.stem[0].weight, model.stem[1].weight, model.stem[1].bias):
                p[copied] = p[source]
            for b in (model.stem[1].running_mean, model.stem[1].running_var):
                b[copied] = b[source]
    options: dict[str, Any] = {
        "keep": 0.905,
        "select": criteria.Redundancy(threshold=0.999),
        "protect": ["bare*"],
    }
    x = batch(9, dtype=torch.float64)
    folded, plan = prune_once(model, example(), **options)
    assert list(plan.tensors["stem.0.weight"].keep[0]) == [0, 2, 4, *range(6, 16)]
    assert sparsekern.verify(model, folded, x) < 1e-6
    cut, _ = prune_once(model, example(), fold=False, **options)
    assert sparsekern.verify(model, cut, x) > 1e-3


def test_norms_are_recalibrated_in_the_smaller_network() -> None:
    model = trained()
    network, plan = prune_once(
        model, example(), keep=0.3, select=criteria.Magnitude(), calibration=calibration()
    )
    small = sparsekern.compact(model, plan)
    sparsekern.recalibrate(small, [inputs for inputs, _ in calibration()])
    for name, value in small.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    features = torch.cat([small.stem(inputs) for inputs, _ in calibration()])
    assert features.isfinite().all()
    without, _ = prune_once(model, example(), keep=0.3, select=criteria.Magnitude())
    assert not torch.equal(without.body[1].running_mean, network.body[1].running_mean)


@pytest.mark.parametrize(
    "given",
    [
        lambda: iter(calibration()),
        lambda: [list(pair) for pair in calibration()],
        lambda: [((inputs,), targets) for inputs, targets in calibration()],
        lambda: [[[inputs], targets] for inputs, targets in calibration()],
        lambda: [({"x": inputs}, targets) for inputs, targets in calibration()],
        lambda: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(
                torch.cat([inputs for inputs, _ in calibration()]), TARGETS.repeat(4)
            ),
            batch_size=4,
        ),
    ],
    ids=["iterator", "lists", "tuples", "nested", "dicts", "loader"],
)
def test_batches_of_any_form_give_the_same(given: Any) -> None:
    expected = prune_once(trained(), example(), keep=0.4, calibration=calibration(), loss=LOSS)
    found = prune_once(trained(), example(), keep=0.4, calibration=given(), loss=LOSS)
    assert found.plan == expected.plan
    assert sparsekern.verify(expected.network, found.network, example()) == 0


def test_no_more_batches_are_used_than_asked_for() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from calibration()

    few = prune_once(trained(), example(), keep=0.4, calibration=calibration(), loss=LOSS, batches=2)
    many = prune_once(trained(), example(), keep=0.4, calibration=endless(), loss=LOSS, batches=2)
    assert few.plan == many.plan


def test_residuals_compiled_models_and_no_grad() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    pairs = [(batch(seed), torch.zeros(4, 1, 8, 8)) for seed in range(2)]
    with torch.no_grad():
        network, plan = prune_once(
            torch.compile(model, backend="eager"),
            batch(0),
            keep=0.4,
            calibration=pairs,
            loss=nn.functional.mse_loss,
            fold=False,
            recalibrate=False,
        )
    assert type(network) is Residual
    assert sparsekern.verify(sparsekern.compact(model, plan), network, batch(3)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 0}, r"^keep: got 0"),
        ({"of": "seconds"}, "^of: got 'seconds'"),
        ({"select": 3}, "^select: got 3"),
        ({"allocate": "all"}, "^allocate: got 'all'"),
        ({"batches": 0}, "^batches: got 0"),
        ({"round_to": -1}, "^round_to: got -1"),
        ({"calibration": None}, "^calibration: got None, expected batches .*Magnitude"),
        ({"loss": None}, "^loss: got None, expected a function, .*Taylor"),
        ({"calibration": []}, "^calibration: got no batch"),
        ({"loss": lambda outputs, targets: outputs}, r"^loss: got Tensor \[4, 4\] for batch 0"),
        ({"loss": lambda outputs, targets: torch.zeros(())}, "^loss: got a value that depends on no param"),
        ({"loss": lambda outputs, targets: outputs.sum() / 0}, "^loss: got -?inf|^loss: got nan"),
        ({"keep": 0.001}, "^keep: got 0.001 of macs, expected at least"),
        ({"protect": ["nowhere"]}, "nowhere"),
        ({"example_inputs": torch.zeros(1, 5, 8, 8)}, "^example_inputs: "),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"keep": 0.4, "calibration": calibration(), "loss": LOSS}
    inputs = changes.pop("example_inputs", example())
    with pytest.raises(ValueError, match=message):
        prune_once(model, inputs, **(options | changes))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_criteria_say_whether_they_need_gradients() -> None:
    assert criteria.default().needs_gradients
    assert (criteria.Magnitude() + criteria.Taylor()).needs_gradients
    assert criteria.Shuffled(of=criteria.GradientCount()).needs_gradients
    assert not (criteria.Redundancy(of=criteria.Magnitude()) * 2).needs_gradients
    assert not criteria.Shuffled(of=criteria.Random()).needs_gradients


PLANNED = """
import sys, torch, sparsekern
from prune.networks import Plain, batch
torch.manual_seed(1)
model = Plain()
optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
pruner = sparsekern.Pruner(model, optimizer, batch(0), keep=0.9, steps=100)
state = torch.load(sys.argv[1], weights_only=True)
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
pruner.load_state_dict(state["pruner"])
sys.stdout.write(pruner.plan(keep=0.3).to_json() + "\\n" + pruner.plan(keep=0.4, of="params").to_json())
"""


def test_another_budget_from_saved_statistics_in_a_fresh_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = sparsekern.Pruner(model, optimizer, batch(0), keep=0.9, steps=100)
    for step in range(8):
        LOSS(model(batch(step)), TARGETS).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, str(tmp_path / "state.pt")],
        cwd=Path(__file__).parents[1],
        env={"PYTHONPATH": f"{Path(sparsekern.__file__).parents[1]}:{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    macs, params = done.stdout.split("\n")
    assert macs == pruner.plan(keep=0.3).to_json()
    assert params == pruner.plan(keep=0.4, of="params").to_json() != macs
    small = sparsekern.compact(model, pruner.plan(keep=0.4, of="params"))
    assert sum(p.numel() for p in small.parameters()) <= 0.4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "macs"}, "^keep: got None with of='macs'"),
        ({"keep": 0.5, "of": "weight"}, "^of: got 'weight'"),
        ({"keep": 0.5, "of": "latency"}, "^of: got 'latency' with a Pruner that has not measured it"),
    ],
)
def test_a_plan_of_what_is_not_known_is_refused(options: dict[str, Any], message: str) -> None:
    model = Plain()
    pruner = sparsekern.Pruner(
        model, sparsekern.optim.AdamW(model.parameters()), batch(0), keep=0.9, steps=100
    )
    with pytest.raises(ValueError, match=message):
        pruner.plan(**options)


@pytest.mark.parametrize(
    "select", ["magnitude", criteria.Random(), criteria.Redundancy(of=criteria.Magnitude())]
)
def test_without_data_no_layer_is_starved(select: Any) -> None:
    """Channels at full resolution cost the most MACs, and norms of weights do not show their importance."""
    model = nn.Sequential()
    widths = [3, 16, 32, 64, 64]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        model.append(nn.Conv2d(inputs, outputs, 3, stride=1 + (i > 0), padding=1)).append(nn.ReLU())
    model.append(nn.Flatten()).append(nn.Linear(64 * 16, 5))
    x = torch.zeros(1, 3, 32, 32)
    for keep in (0.5, 0.25):
        network, _ = prune_once(model, x, keep=keep, select=select)
        left = [module.out_channels for module in network if isinstance(module, nn.Conv2d)]
        floors = [0.75 * keep**0.5 * width - 1 for width in widths[1:]]
        assert all(width >= floor for width, floor in zip(left, floors, strict=True))
    if isinstance(select, criteria.Random):
        return
    starved, _ = prune_once(model, x, keep=0.5, select=select, allocate="global")
    assert starved[0].out_channels < 0.75 * 0.5**0.5 * 16 - 1, "which an explicit choice still does"
