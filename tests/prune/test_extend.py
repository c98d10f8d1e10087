"""A training that is extended by more steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from prune.networks import Plain, batch, train

import sparsekern
from sparsekern import Pruner
from sparsekern.prune.schedule import Schedule

STEPS, LONGER = 24, 60
KEEP = 0.3


def parts(steps: int, *, shrink: bool = False, **options: Any) -> tuple[Plain, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"keep": KEEP, "events": 4, "round_to": 1, "shrink": shrink} | options
    return model, optimizer, Pruner(model, optimizer, batch(0), steps=steps, **options)


def stopped(step: int, path: Path, *, shrink: bool = False, steps: int = STEPS) -> Pruner:
    model, optimizer, pruner = parts(steps, shrink=shrink)
    train(model, optimizer, range(step))
    pruner.save_checkpoint(path)
    return pruner


@pytest.mark.parametrize("shrink", [False, True], ids=["masked", "shrunk"])
@pytest.mark.parametrize("step", [1, 3, 10])
def test_events_not_yet_taken_follow_the_new_schedule(tmp_path: Path, step: int, shrink: bool) -> None:
    before = stopped(step, tmp_path / "a.pt", shrink=shrink)
    assert not before.finished
    model, optimizer, pruner = parts(LONGER, shrink=shrink)
    pruner.load_checkpoint(tmp_path / "a.pt")
    assert pruner.metrics()["step"] == step
    events = Schedule.cubic(steps=LONGER, keep=KEEP, warmup=0.1, finish=0.6, events=4)
    share = before.metrics()["macs_share"]
    for at in range(step, LONGER):
        train(model, optimizer, range(at, at + 1))
        now = pruner.metrics()["macs_share"]
        # Channels that start to fade at one event are removed at the next one.
        due = [event.share for event in events.events if event.step + event.fade_steps <= at + 1]
        assert now <= share + 1e-9 and now <= min(due, default=1.0) + 1e-9
        assert pruner.finished is (at + 1 >= events.finish)
        share = now
    assert share <= KEEP
    assert sparsekern.verify(model, pruner.compact(), batch(99)) < 1e-5


@pytest.mark.parametrize("shrink", [False, True], ids=["masked", "shrunk"])
@pytest.mark.parametrize("step", [11, STEPS])
def test_after_the_last_event_the_finished_network_is_trained_on(
    tmp_path: Path, step: int, shrink: bool
) -> None:
    before = stopped(step, tmp_path / "a.pt", shrink=shrink)
    assert before._events.schedule.after(step) is None
    model, optimizer, pruner = parts(LONGER, shrink=shrink)
    pruner.load_checkpoint(tmp_path / "a.pt")
    assert pruner.finished is before.finished
    train(model, optimizer, range(step, max(step, 14)))
    kept = pruner.metrics()["kept"]
    assert pruner.finished
    train(model, optimizer, range(max(step, 14), LONGER))
    assert pruner.metrics()["kept"] == kept and pruner.finished
    assert pruner.metrics()["step"] == LONGER

    # The same again, from the state of the extended training.
    _, _, again = parts(2 * LONGER)
    _, _, twin = parts(2 * LONGER)
    pruner.save_checkpoint(tmp_path / "b.pt")
    if not shrink:
        again.load_checkpoint(tmp_path / "b.pt")
        twin.load_state_dict(again.state_dict())
        assert again.finished and twin.finished and again.metrics() == twin.metrics()


@pytest.mark.parametrize("second", [8, 40])
def test_an_extended_training_that_is_stopped_ends_bit_identical(tmp_path: Path, second: int) -> None:
    stopped(4, tmp_path / "a.pt")
    whole, optimizer, pruner = parts(LONGER)
    pruner.load_checkpoint(tmp_path / "a.pt")
    train(whole, optimizer, range(4, second))
    pruner.save_checkpoint(tmp_path / "b.pt")
    train(whole, optimizer, range(second, LONGER))

    resumed, optimizer, its_pruner = parts(LONGER)
    its_pruner.load_checkpoint(tmp_path / "b.pt")
    train(resumed, optimizer, range(second, LONGER))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert its_pruner.metrics() == pruner.metrics()


def test_too_few_steps_for_what_is_left_are_refused_and_change_nothing(tmp_path: Path) -> None:
    stopped(12, tmp_path / "a.pt", steps=40)
    _, _, pruner = parts(8)
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises(ValueError, match=r"steps: got 8, .*last event .* expected more steps"):
        pruner.load_checkpoint(tmp_path / "a.pt")
    assert pruner.metrics()["step"] == 0
    assert torch.equal(pruner.state_dict()["channels"], before["channels"])


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        {"events": [], "finish": 14},
        {"events": [[2, 0.5]], "finish": 14},
        {"events": [[9, 0.5, 3], [2, 0.4, 3]], "finish": 14},
        {"events": [[2, -0.5, 3]], "finish": 14},
        {"events": [[2, 0.5, 0]], "finish": 14},
        {"events": [[2, 0.5, 3]], "finish": "14"},
        {"events": [[2, 0.5, 3]], "finish": 1},
        {"events": [[2, float("nan"), 3]], "finish": 14},
    ],
)
def test_a_state_without_a_proper_schedule_is_refused(schedule: Any) -> None:
    _, _, pruner = parts(STEPS)
    with pytest.raises(ValueError, match=r"state\['schedule'\]: got .*expected events"):
        pruner.load_state_dict(pruner.state_dict() | {"schedule": schedule})


def test_a_schedule_comes_back_from_plain_values() -> None:
    schedule = Schedule.cubic(steps=100, keep=0.2, warmup=0.1, finish=0.6, events=7)
    assert Schedule.from_plain(schedule.to_plain()) == schedule
