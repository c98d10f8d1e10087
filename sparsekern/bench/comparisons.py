"""From a case to what is timed: our call and torch's, and the proof that ours is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsekern import optim
from sparsekern.bench import calls
from sparsekern.bench.calls import Call
from sparsekern.bench.cases import Case
from sparsekern.bench.check import difference, forced
from sparsekern.bench.comparison import OURS, Contest
from sparsekern.bench.iteration import iteration
from sparsekern.bench.norm import EAGER, norm_act
from sparsekern.bench.problem import MakeOptimizer, Problem
from sparsekern.kernels.backends import reference


@dataclass(frozen=True)
class Side:
    """One side of a contest over a list of parameters: who keeps their state, and what is called."""

    make: MakeOptimizer
    call: Call
    rows: bool = True


Moved = Callable[[Problem], int]


def race(case: Case, ours: Side, others: dict[str, Side], moved: Moved) -> Contest:
    """Every side gets a problem of its own; ours is right when the reference backend's result is the same."""
    sides, bytes_moved = {}, {}
    for name, side in {OURS: ours, **others}.items():
        problem = Problem.of(case, side.make, rows=side.rows)
        sides[name] = side.call(problem)
        bytes_moved[name] = moved(problem)
        if name == OURS:
            mine = problem

    def wrong() -> str | None:
        twin = Problem.of(case, ours.make, rows=ours.rows)
        sides[OURS]()
        with forced("reference"):
            ours.call(twin)()
        return difference(mine, twin)

    return Contest(sides, bytes_moved, sum(param.numel() for param in mine.params), wrong)


def _op(case: Case, ours: Any, call: Call, theirs: Any, torch_call: Any, accesses: int) -> Contest:
    """An op against torch's functional forms of it."""
    others = {
        f"torch {name}": Side(
            functools.partial(theirs, **{name: True}),
            # Both are said, because torch chooses where one is not.
            functools.partial(torch_call, fused=name == "fused", foreach=name == "foreach"),
            rows=False,
        )
        for name in ("fused", "foreach")
    }
    return race(case, Side(ours, call), others, calls.accesses(accesses))


def _beside(case: Case, call: Any, moved: Moved) -> Contest:
    """An op that torch has no counterpart of, against its plain-torch twin."""
    others = {"reference": Side(optim.AdamW, functools.partial(call, ops=reference))}
    return race(case, Side(optim.AdamW, call), others, moved)


def _step(case: Case, ours: Any, theirs: Any, accesses: int) -> Contest:
    """``optimizer.step()`` against those of torch's fused and foreach optimizers."""
    others = {
        f"torch {name}": Side(functools.partial(theirs, **{name: True}), calls.step, rows=False)
        for name in ("fused", "foreach")
    }
    return race(case, Side(ours, calls.step), others, calls.accesses(accesses))


def _hooks(case: Case) -> Contest:
    """torch's fused AdamW with hooks that carry the rows against the same without."""
    make = functools.partial(torch.optim.AdamW, fused=True)
    others = {"torch fused": Side(make, calls.step, rows=False)}
    return race(case, Side(make, calls.step), others, calls.accesses(7))


_torch_sgd = functools.partial(torch.optim.SGD, momentum=0.9)
_our_sgd = functools.partial(optim.SGD, momentum=0.9)


@dataclass(frozen=True)
class Op:
    """How the cases of an op are built, and beside whom our side is timed."""

    others: tuple[str, ...]
    build: Callable[[Case], Contest]


_TORCH = ("torch fused", "torch foreach")
_TWIN = ("reference",)

# An element's accesses: parameter, gradient and state are read, parameter and state written.
OPS: dict[str, Op] = {
    "adam_step_": Op(
        _TORCH,
        lambda case: _op(case, optim.AdamW, calls.adam_step, torch.optim.AdamW, calls.torch_adam, 7),
    ),
    "sgd_step_": Op(_TORCH, lambda case: _op(case, _our_sgd, calls.sgd_step, _torch_sgd, calls.torch_sgd, 5)),
    "row_statistics_": Op(_TWIN, lambda case: _beside(case, calls.row_statistics, calls.accesses(2))),
    "row_mask_": Op(_TWIN, lambda case: _beside(case, calls.row_mask, calls.changed)),
    "channel_moments_": Op(_TWIN, lambda case: _beside(case, calls.channel_moments, calls.folded)),
    "adamw-step": Op(_TORCH, lambda case: _step(case, optim.AdamW, torch.optim.AdamW, 7)),
    "adam-step": Op(_TORCH, lambda case: _step(case, optim.Adam, torch.optim.Adam, 7)),
    "sgd-step": Op(_TORCH, lambda case: _step(case, _our_sgd, _torch_sgd, 5)),
    "hooks-step": Op(_TORCH[:1], _hooks),
    "norm_act": Op((EAGER,), functools.partial(norm_act, backward=False)),
    "norm_act_backward": Op((EAGER,), functools.partial(norm_act, backward=True)),
    "adamw-iteration": Op(_TORCH, iteration),
    "fused-iteration": Op(_TORCH, functools.partial(iteration, fused=True)),
}
"""Every op by its name in a case. A fused op of another kind brings a function and an entry."""


def build(case: Case) -> Contest:
    """The contest of a case. To be used while the case's backend is forced (:func:`check.forced`)."""
    return OPS[case.op].build(case)


def sides(case: Case) -> tuple[str, ...]:
    """The names of a case's sides, ours first."""
    return (OURS, *OPS[case.op].others)
