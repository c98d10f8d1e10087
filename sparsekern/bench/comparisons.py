"""Building the comparison of a case: the calls of sparsekern and torch, and the check of the result."""

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
from sparsekern.bench.comparison import OURS, Comparison
from sparsekern.bench.iteration import iteration
from sparsekern.bench.norm import EAGER, norm_act
from sparsekern.bench.problem import MakeOptimizer, Problem
from sparsekern.kernels.backends import reference


@dataclass(frozen=True)
class Candidate:
    """A candidate in a comparison over a list of parameters.

    Attributes:
        make: makes the optimizer that keeps the state of the parameters.
        call: gives the timed call for a problem.
        rows: whether a row table is attached to the optimizer.
    """

    make: MakeOptimizer
    call: Call
    rows: bool = True


Moved = Callable[[Problem], int]


def make_comparison(case: Case, ours: Candidate, others: dict[str, Candidate], moved: Moved) -> Comparison:
    """Prepare a comparison whose candidates are timed in turns, each on its own copy of the problem.

    Args:
        case: the case.
        ours: sparsekern's candidate. Its result is validated against the reference backend.
        others: the other candidates, by name.
        moved: the least bytes that a call on a problem must move.
    """
    runs, bytes_moved = {}, {}
    for name, candidate in {OURS: ours, **others}.items():
        problem = Problem.of(case, candidate.make, rows=candidate.rows)
        runs[name] = candidate.call(problem)
        bytes_moved[name] = moved(problem)
        if name == OURS:
            mine = problem

    def mismatch() -> str | None:
        twin = Problem.of(case, ours.make, rows=ours.rows)
        runs[OURS]()
        with forced("reference"):
            ours.call(twin)()
        return difference(mine, twin)

    return Comparison(runs, bytes_moved, sum(param.numel() for param in mine.params), mismatch)


def _op(case: Case, ours: Any, call: Call, theirs: Any, torch_call: Any, accesses: int) -> Comparison:
    """An op against torch's fused and foreach functions."""
    others = {
        f"torch {name}": Candidate(
            functools.partial(theirs, **{name: True}),
            # Both flags are given, because torch chooses by itself where one is missing.
            functools.partial(torch_call, fused=name == "fused", foreach=name == "foreach"),
            rows=False,
        )
        for name in ("fused", "foreach")
    }
    return make_comparison(case, Candidate(ours, call), others, calls.accesses(accesses))


def _beside(case: Case, call: Any, moved: Moved) -> Comparison:
    """An op without a counterpart in torch, against the reference backend in plain torch."""
    others = {"reference": Candidate(optim.AdamW, functools.partial(call, ops=reference))}
    return make_comparison(case, Candidate(optim.AdamW, call), others, moved)


def _step(case: Case, ours: Any, theirs: Any, accesses: int) -> Comparison:
    """``optimizer.step()`` against the steps of torch's fused and foreach optimizers."""
    others = {
        f"torch {name}": Candidate(functools.partial(theirs, **{name: True}), calls.step, rows=False)
        for name in ("fused", "foreach")
    }
    return make_comparison(case, Candidate(ours, calls.step), others, calls.accesses(accesses))


def _hooks(case: Case) -> Comparison:
    """torch's fused AdamW with sparsekern's hooks and row table, against the same optimizer without them."""
    make = functools.partial(torch.optim.AdamW, fused=True)
    others = {"torch fused": Candidate(make, calls.step, rows=False)}
    return make_comparison(case, Candidate(make, calls.step), others, calls.accesses(7))


_torch_sgd = functools.partial(torch.optim.SGD, momentum=0.9)
_our_sgd = functools.partial(optim.SGD, momentum=0.9)


@dataclass(frozen=True)
class Op:
    """The comparison of an op.

    Attributes:
        others: names of the candidates other than sparsekern.
        build: builds the comparison of a case.
    """

    others: tuple[str, ...]
    build: Callable[[Case], Comparison]


_TORCH = ("torch fused", "torch foreach")
_TWIN = ("reference",)

# The last argument is the number of accesses to an element: parameter, gradient and state are read, parameter
# and state are written.
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
"""Every op by its name in a case. A new kind of op needs a function and an entry here."""


def build(case: Case) -> Comparison:
    """The comparison of a case; it must be built and used while :func:`check.forced` forces its backend."""
    return OPS[case.op].build(case)


def candidates(case: Case) -> tuple[str, ...]:
    """The names of a case's candidates, sparsekern first."""
    return (OURS, *OPS[case.op].others)
