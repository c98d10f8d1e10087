"""Learning rates that differ between processes: an error that names rank and rate, and no process waits."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist
from distributed.training import STEPS, batch, loss_of, start
from torch.distributed.checkpoint.state_dict import get_state_dict

from benchmarks.processes import run
from sparsekern.prune.run.step_count import Rates, differing_rates


def _trained(how: str, optimizer: str, zero_at: tuple[int, ...], rank: int | None, silent: bool) -> str:
    """Train with a rate of 0 in some steps, in one process or all; returns the error, else the channels kept.

    ``silent`` makes the gradients of these steps 0 as well.
    """
    own = start(how, optimizer=optimizer)
    for step in range(STEPS):
        zero = step in zero_at and rank in (None, own.rank)
        own.optimizer.param_groups[0]["lr"] = 0.0 if zero else 0.01
        loss = loss_of(own.model, batch(step, rank=own.rank, ranks=own.ranks))
        (loss * 0 if silent and step in zero_at else loss).backward()
        try:
            own.optimizer.step()
        except RuntimeError as error:
            return str(error)
        own.optimizer.zero_grad()
    metrics = own.pruner.metrics()
    return f"{metrics['step']} steps, finished {metrics['finished']}"


@pytest.mark.parametrize("how", ["parallel", "sharded"])
def test_a_rate_of_zero_in_one_process_is_named(how: str) -> None:
    began = time.monotonic()
    for found in run(_trained, 2, how, "ours AdamW", (1,), 1, False):
        assert "other values in rank 1 of 2" in found or "other values in rank 0 of 2" in found
        assert "learning rates at step 2: rank 0 has [0.01], rank 1 has [0.0]" in found
    assert time.monotonic() - began < 60


def _each(cases: list[tuple[Any, ...]]) -> list[str]:
    return [_trained(*case) for case in cases]


def test_steps_that_train_nothing_are_alike_everywhere() -> None:
    """A step with rate 0 counts in all processes if there are gradients, and in none otherwise."""
    cases: list[tuple[Any, ...]] = []
    for how in ("parallel", "sharded"):
        for optimizer in ("ours SGD", "torch SGD"):
            cases += [(how, optimizer, (0,), None, False), (how, optimizer, (0,), None, True)]
    for found in run(_each, 2, cases):
        assert found[0::2] == [f"{STEPS} steps, finished 1"] * 4
        assert found[1::2] == [f"{STEPS - 1} steps, finished 1"] * 4


def _state_of_one() -> int:
    """One process alone lets torch.distributed.checkpoint make SGD's state, which counts no steps."""
    own = start("parallel", optimizer="ours SGD")
    if dist.get_rank() == 0:
        get_state_dict(own.inner, own.optimizer)
    own.train(range(STEPS))
    return int(own.pruner.metrics()["step"])


def test_state_made_in_one_process_alone_waits_for_nobody() -> None:
    assert run(_state_of_one, 2) == [STEPS, STEPS]


class _Optimizer:
    def __init__(self, *rates: Any) -> None:
        self.param_groups = [{"lr": rate} for rate in rates]


def test_the_first_difference_is_named() -> None:
    one, other = Rates(), Rates()
    for step, (mine, yours) in enumerate([(0.1, 0.1), (0.2, 0.2), (0.2, 0.3), (0.4, 0.4)], 1):
        one.note(step, _Optimizer(mine, None))  # type: ignore[arg-type]
        other.note(step, _Optimizer(yours, None))  # type: ignore[arg-type]
    assert len(one.parts()) == 3
    every = [one.parts(), other.parts()]
    assert differing_rates(every) == (
        "learning rates at step 3: rank 0 has [0.2, None], rank 1 has [0.3, None]"
    )
    assert differing_rates([one.parts(), one.parts()]) == ""
