"""The configurations that torch tests its own optimizers with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.cases import assert_near, grade, parameters

from sparsekern import optim

try:
    from torch.testing._internal.common_optimizers import optim_db
except ImportError:  # private, and not in every build; test_parity has options of its own
    optim_db = []
# Importing it forbids the whole process to set torch.backends.*.enabled and the like.
torch.backends.__allow_nonbracketed_mutation_flag = True

OURS = {"SGD": optim.SGD, "Adam": optim.Adam, "AdamW": optim.AdamW}
INFOS = [info for info in optim_db if info.optim_cls.__name__ in OURS]
DTYPES = (torch.float32, torch.float64, torch.float16)


def _inputs() -> list[Any]:
    return [
        pytest.param(info.optim_cls, case.kwargs, dtype, id=f"{info.name}-{case.desc}-{dtype}")
        for info in INFOS
        for dtype in DTYPES
        for case in info.optim_inputs_func("cpu", dtype)
    ]


def _error_inputs() -> list[Any]:
    return [
        pytest.param(info.optim_cls, error, id=f"{info.name}-{error.optimizer_error_input.desc}")
        for info in INFOS
        for error in info.optim_error_inputs_func("cpu", torch.float32)
    ]


@pytest.mark.parametrize(("theirs", "options", "dtype"), _inputs())
def test_configurations(theirs: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    pair = OURS[theirs.__name__](params, **options), theirs(others, **copy.deepcopy(options))
    for seed in range(4):
        grade(params, seed, others)
        for optimizer in pair:
            optimizer.step()
    if dtype is torch.float16:
        # torch rounds to 16 bits between the operations of a step, we at its end.
        for param, other in zip(params, others, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-2, atol=1e-2)
    else:
        assert_near(params, others)


@pytest.mark.parametrize(("theirs", "error"), _error_inputs())
def test_errors(theirs: Any, error: Any) -> None:
    given = error.optimizer_error_input
    params = parameters() if given.params is None else given.params
    make = OURS[theirs.__name__]
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            make(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            make(params, **given.kwargs)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_schedulers(info: Any) -> None:
    for makers in info.scheduler_inputs:
        params, others = parameters(), parameters()
        pair = OURS[info.name](params, lr=0.1), info.optim_cls(others, lr=0.1)
        schedulers = [[make(optimizer) for make in makers] for optimizer in pair]
        for seed in range(12):
            grade(params, seed, others)
            for optimizer, chain in zip(pair, schedulers, strict=True):
                optimizer.step()
                for scheduler in chain:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(1.0) if plateau else scheduler.step()
            assert pair[0].param_groups[0]["lr"] == pair[1].param_groups[0]["lr"]
        for param, other in zip(params, others, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
