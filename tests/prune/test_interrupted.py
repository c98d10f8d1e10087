"""Events, shrinks and loads that are interrupted or fail take effect as a whole or not at all.

``SPARSEKERN_INTERRUPTIONS=N`` interrupts each at N lines instead of a few.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupting import At, Injected, copied, ctrl_c, failure
from prune.networks import Plain, batch
from torch import nn

import sparsekern
from sparsekern import Pruner
from sparsekern.compact import plan_of
from sparsekern.prune.state.masking import MASKED

STEPS = 14
LINES = int(os.environ.get("SPARSEKERN_INTERRUPTIONS", "2"))
FILES = tuple(
    f"sparsekern/{name}.py"
    for name in (
        "prune/pruner",
        "prune/run/events",
        "prune/state/masking",
        "prune/state/places",
        "prune/state/network",
        "prune/decide/policy",
        "prune/state/statistics",
        "prune/state/activations",
        "prune/save/saved_state",
        "prune/save/checkpoint",
        "prune/save/generators",
        "compact/transaction",
        "compact/shrink",
        "compact/optimizer_state",
        "distributed/data_parallel",
        "compact/surgery",
        "kernels/rows",
    )
)
DOUBLE = torch.float64
Parts = tuple[nn.Module, torch.optim.Optimizer, Pruner]


def parts(shrink: bool, select: sparsekern.criteria.Criterion | None = None, **options: Any) -> Parts:
    torch.manual_seed(0)
    model = Plain(8).double()
    with torch.no_grad():
        # Duplicate filters, so that some channels are folded.
        for position in (0, 2):
            model.stem[0].weight[position + 1] = model.stem[0].weight[position]
    sparsekern.fusion.fuse(model, batch(0, dtype=DOUBLE))
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    defaults: dict = {"keep": 0.3, "steps": STEPS, "events": 3, "shrink": shrink, "round_to": 1}
    pruner = Pruner(model, optimizer, batch(0, dtype=DOUBLE), select=select, **(defaults | options))
    return model, optimizer, pruner


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> Any:
    """All that an event or a load changes, in a form that ``==`` compares bit by bit."""
    sizes = [
        {name: value for name, value in vars(module).items() if isinstance(value, (int, str))}
        for module in model.modules()
    ]
    grads = [None if p.grad is None else copied(p.grad) for p in model.parameters()]
    elements, masks = pruner._network.rows.table.elements, pruner._network.activations.mask
    parts_ = (model.state_dict(), optimizer.state_dict(), pruner.state_dict(), elements, masks)
    return copied(parts_), grads, sizes, plan_of(model).to_json(), pruner.graph.num_channels


def backward(model: nn.Module, step: int) -> None:
    model(batch(step, dtype=DOUBLE)).square().mean().backward()


def decisions(pruner: Pruner) -> list[int]:
    return [*(event.step for event in pruner._events.schedule.events), pruner._events.schedule.finish]


def undisturbed(shrink: bool, select: sparsekern.criteria.Criterion | None) -> tuple[list[Any], list[int]]:
    """The state after every step, and the number of lines that each decision runs."""
    own = parts(shrink, select)
    states, lines = [], []
    for step in range(STEPS):
        backward(own[0], step)
        with At(0, ctrl_c, FILES, "_decide") as counter:
            own[1].step()
        if step + 1 in decisions(own[2]):
            lines.append(counter.seen)
        states.append(everything(*own))
        if select == SELECT["folding"] and step + 1 == decisions(own[2])[0]:
            # At the first decision only folded channels are masked at once.
            assert (own[2].state_dict()["channels"] >= MASKED).any()
        own[1].zero_grad()
    return states, lines


SELECT = {"default": None, "folding": sparsekern.criteria.Redundancy()}


@pytest.mark.parametrize(("shrink", "select"), [(False, SELECT["folding"]), (True, SELECT["default"])])
def test_ctrl_c_at_any_line_of_a_decision_waits_for_its_end(
    shrink: bool, select: sparsekern.criteria.Criterion | None
) -> None:
    expected, lines = undisturbed(shrink, select)
    assert len(lines) == 4 and min(lines[:3]) > 300
    random = np.random.default_rng(shrink)
    for _ in range(max(1, LINES // 4)):
        own = parts(shrink, select)
        # At the first lines Ctrl-C is not deferred yet: nothing is decided, and the next step catches up.
        at = iter([int(random.integers(12, count)) for count in lines])
        for step in range(STEPS):
            backward(own[0], step)
            if step + 1 in decisions(own[2]):
                with pytest.raises(KeyboardInterrupt), At(next(at), ctrl_c, FILES, "_decide"):
                    own[1].step()
            else:
                own[1].step()
            assert everything(*own) == expected[step], step
            own[1].zero_grad()
        assert own[2].finished


@pytest.mark.parametrize("act", [ctrl_c, failure])
@pytest.mark.parametrize("shrink", [False, True])
def test_a_decision_that_fails_is_undone_and_made_up_for(shrink: bool, act: Callable[[], None]) -> None:
    select = sparsekern.criteria.Taylor()
    expected, lines = undisturbed(shrink, select)
    random = np.random.default_rng(7)
    for _ in range(max(1, LINES // 2)):
        own = parts(shrink, select)
        model, optimizer, pruner = own
        # Ctrl-C takes effect at once only at the first lines.
        at = iter([int(random.integers(1, 12 if act is ctrl_c else count)) for count in lines])
        same, undone = True, 0
        for step in range(STEPS):
            backward(model, step)
            if step + 1 in decisions(pruner):
                decide, before = pruner._events._decide, []

                def watched(due: int, own: Parts = own, decide: Any = decide, before: Any = before) -> None:
                    before.append(everything(*own))
                    decide(due)

                pruner._events._decide = watched  # type: ignore[method-assign]
                with pytest.raises((KeyboardInterrupt, Injected)), At(next(at), act, FILES, "_decide"):
                    optimizer.step()
                del pruner._events._decide
                found = everything(*own)
                assert found == before[-1] or (not same or found == expected[step]), step
                undone += found == before[-1]
                same &= found == expected[step]
            else:
                optimizer.step()
            optimizer.zero_grad()
        assert undone and pruner.finished
        assert sparsekern.verify(model, pruner.compact(), batch(9, dtype=DOUBLE)) < 1e-12
        last, _, _ = reference(shrink, select)
        for name, value in model.named_parameters():
            # A step with the shapes from before the shrink rounds differently.
            torch.testing.assert_close(
                value, last.get_parameter(name), rtol=1e-9 * shrink, atol=1e-12 * shrink
            )


@lru_cache
def reference(shrink: bool, select: sparsekern.criteria.Criterion | None) -> Parts:
    """An undisturbed training."""
    own = parts(shrink, select)
    for step in range(STEPS):
        backward(own[0], step)
        own[1].step()
        own[1].zero_grad()
    return own


@pytest.mark.parametrize("act", [ctrl_c, failure])
def test_a_shrink_by_hand_is_whole_or_undone(act: Callable[[], None]) -> None:
    def trained() -> Parts:
        own = parts(False)
        for step in range(10):
            backward(own[0], step)
            own[1].step()
            if step < 9:
                own[1].zero_grad()
        return own

    own = trained()
    before = everything(*own)
    with At(0, act, FILES, "shrink") as counter:
        own[2].shrink()
    after = everything(*own)
    assert after != before
    random = np.random.default_rng(3)
    own = trained()
    for line in random.integers(1, counter.seen, max(1, LINES // 2)):
        with pytest.raises((KeyboardInterrupt, Injected)), At(int(line), act, FILES, "shrink"):
            own[2].shrink()
        found = everything(*own)
        assert found in (before, after), line
        if found == after:
            own = trained()


@pytest.mark.parametrize("act", [ctrl_c, failure])
@pytest.mark.parametrize("what", ["checkpoint", "state"])
def test_a_load_is_whole_or_undone(what: str, act: Callable[[], None], tmp_path: Path) -> None:
    saved = parts(True)
    for step in range(7):
        backward(saved[0], step)
        saved[1].step()
        saved[1].zero_grad()
    path = tmp_path / "checkpoint.pt"
    saved[2].save_checkpoint(path)
    state = saved[2].state_dict()

    def load(pruner: Pruner) -> None:
        pruner.load_checkpoint(path) if what == "checkpoint" else pruner.load_state_dict(state)

    name = "load_checkpoint" if what == "checkpoint" else "load_state_dict"

    def fresh() -> tuple[Parts, Any]:
        own = parts(True)
        backward(own[0], 0)
        own[1].step()
        return own, everything(*own)

    own, before = fresh()
    with At(0, act, FILES, name) as counter:
        load(own[2])
    after = everything(*own)
    random = np.random.default_rng(4)
    own, before = fresh()
    for line in random.integers(1, counter.seen, max(1, LINES // 2)):
        generator = torch.get_rng_state()
        with pytest.raises((KeyboardInterrupt, Injected)), At(int(line), act, FILES, name):
            load(own[2])
        found = everything(*own)
        assert found in (before, after), line
        if found == after:
            own, before = fresh()
        else:
            assert torch.equal(torch.get_rng_state(), generator)
    load(own[2])
    assert everything(*own) == after


def test_what_a_users_code_raises_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    class Fails(sparsekern.criteria.Taylor):
        def __call__(self, statistics: Any) -> Any:
            if next(calls) == 0:
                raise OSError("criterion")
            return super().__call__(statistics)

    model, optimizer, pruner = own = parts(True, Fails())
    due = decisions(pruner)[0]
    for step in range(due):
        backward(model, step)
        if step + 1 == due:
            with pytest.raises(OSError, match="criterion"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    assert pruner.metrics()["step"] == due and not pruner.metrics()["condemned"]
    backward(model, due)
    optimizer.step()
    assert pruner.metrics()["condemned"]
    for step in range(due + 1, decisions(pruner)[1] - 1):
        backward(model, step)
        optimizer.step()
    before = everything(*own)

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("cut")

    monkeypatch.setattr(sys.modules["sparsekern.compact.shrink"], "cut", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert everything(*own)[2:] == before[2:]
    monkeypatch.undo()
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    assert pruner.finished
    assert sparsekern.verify(model, pruner.compact(), batch(9, dtype=DOUBLE)) < 1e-12
