"""The configurations that torch tests its own optimizers with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.cases import Case, OptimizerFactory, assert_near, parameters, set_grads
from optim.configurations import Inputs, errors, inputs
from torch.optim import lr_scheduler

from sparsekern import optim

DTYPES = (torch.float32, torch.float64, torch.float16)
INPUTS = [pytest.param(i, dtype, id=f"{i}-{dtype}") for dtype in DTYPES for i in inputs(dtype)]


@pytest.mark.parametrize(("given", "dtype"), INPUTS)
def test_configurations(given: Inputs, dtype: torch.dtype) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    ours = getattr(optim, given.name)(params, **given.options)
    theirs = getattr(torch.optim, given.name)(others, **copy.deepcopy(given.options))
    for seed in range(4):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    if dtype is torch.float16:
        # Torch rounds to 16 bits between the operations of a step, sparsekern at its end.
        for param, other in zip(params, others, strict=True):
            torch.testing.assert_close(param, other, rtol=1e-2, atol=1e-2)
    else:
        assert_near(params, others)


@pytest.mark.parametrize("given", errors(), ids=str)
def test_errors(given: Inputs) -> None:
    assert given.error is not None
    params = parameters() if given.params is None else given.params
    warns = issubclass(given.error, Warning)
    with (pytest.warns if warns else pytest.raises)(given.error, match=given.message):
        getattr(optim, given.name)(params, **given.options)


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: [lr_scheduler.StepLR(o, 5, 0.9)],
    "linear and exponential": lambda o: [
        lr_scheduler.LinearLR(o, 0.4, total_iters=4),
        lr_scheduler.ExponentialLR(o, 0.9),
    ],
    "warm restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 3)],
    "cyclic, with momentum or beta": lambda o: [lr_scheduler.OneCycleLR(o, 0.1, total_steps=13)],
    "sequential": lambda o: [
        lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.PolynomialLR(o, 9)], [3])
    ],
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(case: Case, make: Any) -> None:
    under = OptimizerFactory(case, attached=False)
    params, others = parameters(), parameters()
    options = {"momentum": 0.9} if "momentum" in case.ours([params[0]]).defaults else {}
    pair = under(params, lr=0.1, **options), under.theirs(others, lr=0.1, **options)
    schedulers = [make(optimizer) for optimizer in pair]
    for seed in range(12):
        set_grads(params, seed, others)
        for optimizer, chain in zip(pair, schedulers, strict=True):
            optimizer.step()
            for scheduler in chain:
                scheduler.step()
        mine, yours = (optimizer.param_groups[0] for optimizer in pair)
        assert {k: v for k, v in mine.items() if k not in ("params", "foreach")} == {
            k: v for k, v in yours.items() if k not in ("params", "foreach")
        }
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-4)
