"""The timed calls of sparsekern and torch, and the number of bytes that each call must move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from sparsekern.bench.problem import Problem
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.options import (
    ADAM,
    MASK,
    SGD,
    STATISTICS,
    AdamOptions,
    MaskOptions,
    SgdOptions,
    StatisticsOptions,
)
from sparsekern.kernels.rows import Rows

Run = Callable[[], Any]
Call = Callable[[Problem], Run]

# Hyperparameters that sparsekern's options and torch's functions name alike.
ADAM_VALUES: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "lr": 1e-3}
SGD_VALUES: dict[str, Any] = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "lr": 1e-3}
_OFF: dict[str, Any] = {"maximize": False, "grad_scale": None, "found_inf": None}

# Bytes per row: penalty, elements, countdown, threshold and activity are read (4 bytes each); four sums,
# threshold and activity are written.
ROW_BYTES = 5 * 4 + 6 * 4


def rows_of(problem: Problem) -> Rows | None:
    """The rows of the problem's parameters; None without a row table."""
    return None if problem.table is None else problem.table.rows_of(problem.params)


def _adam_lists(problem: Problem) -> tuple[Any, ...]:
    state = [problem.state(name) for name in ("exp_avg", "exp_avg_sq")]
    return (problem.params, problem.grads, *state, [], problem.state("step"))


def _sgd_lists(problem: Problem) -> tuple[Any, ...]:
    return (problem.params, problem.grads, problem.state("momentum_buffer"))


def adam_step(problem: Problem, ops: ModuleType = _ops) -> Run:
    """The op ``adam_step_`` as AdamW calls it; ``ops`` may be a backend."""
    options = AdamOptions(decoupled=True, **ADAM_VALUES)
    return functools.partial(ops.step_, ADAM, _adam_lists(problem), options, rows_of(problem))


def torch_adam(problem: Problem, **choice: bool) -> Run:
    """torch's functional AdamW; ``choice`` is ``fused=True`` or ``foreach=True``."""
    options: dict[str, Any] = {"decoupled_weight_decay": True, "amsgrad": False, "capturable": False}
    options |= ADAM_VALUES | _OFF | choice
    return torch.no_grad()(functools.partial(adam, *_adam_lists(problem), **options))


def sgd_step(problem: Problem, ops: ModuleType = _ops) -> Run:
    """The op ``sgd_step_`` as SGD with momentum calls it; ``ops`` may be a backend."""
    return functools.partial(ops.step_, SGD, _sgd_lists(problem), SgdOptions(**SGD_VALUES), rows_of(problem))


def torch_sgd(problem: Problem, **choice: bool) -> Run:
    """torch's functional SGD with momentum; ``choice`` is ``fused=True`` or ``foreach=True``."""
    options: dict[str, Any] = {"nesterov": False} | SGD_VALUES | _OFF | choice
    return torch.no_grad()(functools.partial(sgd, *_sgd_lists(problem), **options))


def row_statistics(problem: Problem, ops: ModuleType = _ops) -> Run:
    """The op ``row_statistics_``; ``ops`` may be a backend."""
    lists = (problem.params, problem.grads)
    return functools.partial(ops.step_, STATISTICS, lists, StatisticsOptions(), rows_of(problem))


def row_mask(problem: Problem, ops: ModuleType = _ops) -> Run:
    """The op ``row_mask_``: penalty, fade-out and mask; ``ops`` may be a backend."""
    options = MaskOptions(ADAM_VALUES["lr"])
    return functools.partial(ops.step_, MASK, (problem.params,), options, rows_of(problem))


def channel_moments(problem: Problem, ops: ModuleType = _ops) -> Run:
    """The op ``channel_moments_``, which updates the means per channel; ``ops`` may be a backend."""
    table = problem.table
    assert table is not None
    row_statistics(problem, reference)()

    def run() -> None:
        # A step sets `pending`; without it the op does nothing.
        table.pending.fill_(1)
        ops.channel_moments_(table)

    return run


def step(problem: Problem) -> Run:
    """The whole ``optimizer.step()``, including its Python code."""
    return problem.optimizer.step


def accesses(times: int) -> Callable[[Problem], int]:
    """The bytes of a call with ``times`` accesses to each live element, plus the bytes of the row table."""

    def moved(problem: Problem) -> int:
        rows = 0 if problem.table is None else len(problem.table.penalty)
        return problem.live_elements() * problem.params[0].element_size() * times + rows * ROW_BYTES

    return moved


def changed(problem: Problem) -> int:
    """Bytes of ``row_mask_``: masked rows are written, penalised and fading rows are read and written."""
    table = problem.table
    assert table is not None
    moved = 8 * len(table.penalty)
    for view in table.views:
        size = view.param.numel() // max(1, view.rows) * view.param.element_size()
        masked = table.countdown[view.slice] == 0
        touched = ((table.penalty[view.slice] > 0) | (table.countdown[view.slice] > 0)) & ~masked
        moved += size * (int(masked.sum()) + 2 * int(touched.sum()))
    return moved


def folded(problem: Problem) -> int:
    """Bytes of ``channel_moments_``.

    A gate has an index and a dot, which is read and cleared. A channel has an offset and two means.
    """
    assert problem.table is not None
    return 16 * len(problem.table.gate_rows) + 24 * len(problem.table.channel_dot)
