from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch

from sparsekern.recipes.checkpoint import load_checkpoint, save_checkpoint
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import generate
from sparsekern.recipes.train import Trainer, learning_rate

STEPS = 20
PRUNED = Settings(width=4, depth=2, keep=0.4, steps=STEPS, batch=2, crop=32, evaluations=2, min_channels=1)
DENSE = replace(PRUNED, keep=None)
SHRUNK = replace(PRUNED, shrink=True, round_to=1)
TRAIN, TEST = generate(5, 40, seed=1), generate(2, 40, seed=2)


def trainer(settings: Settings) -> Trainer:
    return Trainer(settings, TRAIN, TEST)


def assert_equal(a: object, b: object, where: str = "state") -> None:
    """Elementwise and exact equality of nested plain data and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


def without_times(state: dict) -> dict:
    history = {key: value for key, value in state["history"].items() if "seconds" not in key}
    return {**state, "history": history}


def test_the_rate_rises_and_falls_to_zero():
    rates = [learning_rate(step, steps=100, warmup=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, steps=1, warmup=0.0) == 1.0


@pytest.mark.parametrize("settings", [DENSE, PRUNED], ids=["dense", "pruned"])
def test_a_run_records_every_step_and_scores_when_due(settings):
    run, seen = trainer(settings), []
    run.run(on_step=seen.append)
    history = run.history
    assert run.finished and run.step == STEPS
    assert [step.step for step in seen] == list(range(1, STEPS + 1))
    assert len(history.loss) == len(history.seconds) == len(history.optimizer_seconds) == STEPS
    assert all(0 < o < s for o, s in zip(history.optimizer_seconds, history.seconds, strict=True))
    assert [row[0] for row in history.scores] == [10, 20]
    assert seen[8].scores is None and seen[-1].scores == tuple(history.scores[-1][1:])


def test_a_pruned_run_meets_its_budget_and_keeps_it():
    run, shares = trainer(PRUNED), []
    run.run(on_step=lambda step: shares.append(step.macs_share))
    assert run.pruner.finished
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0 and 0.2 < shares[-1] <= 0.4
    assert shares[-1] == pytest.approx(run.pruner.metrics()["macs_share"])


def test_a_shrunk_run_trains_the_network_that_its_metrics_tell_of():
    run = trainer(SHRUNK)
    run.run()
    size = sum(p.numel() for p in run.model.parameters())
    assert size == run.pruner.metrics()["params"] < sum(p.numel() for p in trainer(DENSE).model.parameters())
    assert 0.2 < run.pruner.metrics()["macs_share"] <= 0.4


@functools.cache
def end_of(settings: Settings) -> dict:
    whole = trainer(settings)
    whole.run()
    return without_times(whole.state_dict())


@pytest.mark.parametrize("settings", [DENSE, PRUNED, SHRUNK], ids=["dense", "pruned", "shrunk"])
@pytest.mark.parametrize("stop", [1, 9, 13])
def test_a_run_that_was_stopped_ends_bit_identical(tmp_path, settings, stop):
    first = trainer(settings)
    first.run(stop)
    assert first.step == stop and not first.finished
    save_checkpoint(tmp_path / "checkpoint.pt", first.state_dict())
    torch.manual_seed(99)
    second = trainer(settings)
    second.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    second.run()
    assert_equal(without_times(second.state_dict()), end_of(settings))


OTHERS = {
    "another model": (replace(DENSE, model="mobilenetv3-small", width=None), "--model"),
    "another width": (replace(PRUNED, width=3), "--width"),
    "another budget": (replace(PRUNED, keep=0.5), "--keep"),
    "dense": (DENSE, "--keep"),
    "another seed": (replace(PRUNED, seed=7), "--seed"),
    "shrunk": (SHRUNK, "--round-to"),
    "fewer steps": (replace(PRUNED, steps=STEPS - 1), "--steps"),
}


@pytest.fixture(scope="module")
def stopped() -> dict:
    run = trainer(PRUNED)
    run.run(4)
    return run.state_dict()


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_run_is_refused_and_changes_nothing(stopped, other):
    settings, name = OTHERS[other]
    run = trainer(settings)
    before = copy.deepcopy(run.state_dict())
    with pytest.raises(InputError, match=f"--resume: .*{name}.*expected"):
        run.load_state_dict(stopped)
    assert_equal(run.state_dict(), before)


def test_other_images_or_shapes_are_refused(stopped):
    other = Trainer(PRUNED, generate(5, 40, seed=3), TEST)
    with pytest.raises(InputError, match="other images"):
        other.load_state_dict(stopped)
    run = trainer(PRUNED)
    shapes = {**stopped["shapes"], "head.weight": [3, 4, 1, 1]}
    with pytest.raises(InputError, match=r"another network; head\.weight is \[3, 4, 1, 1\] there"):
        run.load_state_dict({**stopped, "shapes": shapes})
    with pytest.raises(InputError, match="lacks 'random'"):
        run.load_state_dict({key: v for key, v in stopped.items() if key != "random"})


def test_images_that_do_not_fill_the_crop_or_the_network_are_padded():
    run = Trainer(replace(PRUNED, crop=48, steps=4), TRAIN, generate(1, 24, seed=0))
    run.run()
    assert run.finished and run.example.shape == (1, 3, 48, 48)
    assert all(math.isfinite(loss) for loss in run.history.loss)


def test_a_pruned_run_is_extended(stopped):
    longer = replace(PRUNED, steps=40)
    run = trainer(longer)
    run.load_state_dict(stopped)
    rate = longer.lr * learning_rate(4, steps=40, warmup=longer.lr_warmup)
    assert run.step == 4 and run.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    run.run()
    assert run.finished and run.pruner.finished and len(run.history.loss) == 40
    assert run.pruner.metrics()["macs_share"] <= 0.4


def test_a_finished_run_trains_on_at_the_rate_of_the_longer_schedule():
    run = trainer(DENSE)
    end, times = end_of(DENSE), [0.0] * STEPS
    run.load_state_dict(end | {"history": end["history"] | {"seconds": times, "optimizer_seconds": times}})
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    longer = trainer(replace(DENSE, steps=30))
    longer.load_state_dict(run.state_dict())
    assert longer.optimizer.param_groups[0]["lr"] > 0.1 * DENSE.lr
    longer.run(STEPS + 1)
    assert any(not torch.equal(value, before[name]) for name, value in longer.model.named_parameters())
