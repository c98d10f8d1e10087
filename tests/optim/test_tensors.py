"""Supported parameters and gradients: dtypes, layouts, memory orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.cases import (
    OptimizerFactory,
    assert_near,
    assert_same,
    attached_table,
    copies,
    parameters,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter


def _sparse() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 2), torch.eye(4, 2).to_sparse()


def _mixed() -> tuple[Tensor, Tensor]:
    return torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64)


def _tiny() -> tuple[Tensor, Tensor]:
    one = torch.ones(3).to(torch.float8_e4m3fn)
    return one, one.clone()


@pytest.mark.parametrize(
    ("make", "message"),
    [(_sparse, "sparse gradient"), (_mixed, "complex"), (_tiny, "float8_e4m3fn")],
)
def test_what_cannot_be_stepped_is_refused_before_anything_changes(
    under: OptimizerFactory, make: Any, message: str
) -> None:
    value, grad = make()
    params = parameters()
    bad = Parameter(value)
    ours = under([{"params": params}, {"params": [bad], "lr": 0.1}])
    for seed in range(2):
        set_grads(params, seed)
        bad.grad = grad
        before = snapshot(ours, attached_table(ours))
        with pytest.raises(RuntimeError, match=f"parameter 0 of group 1 has .*{message}"):
            ours.step()
        assert_same(snapshot(ours, attached_table(ours)), before)
        bad.grad = None
        ours.step()


def test_gradients_may_lie_in_another_order_than_the_parameter(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under(params), under.theirs(others)
    for seed in range(3):
        set_grads(params, seed, others)
        params[0].grad = params[0].grad.contiguous(memory_format=torch.channels_last)
        params[1].grad = params[1].grad.contiguous()
        params[2].grad = params[2].grad.transpose(0, 1).contiguous().transpose(0, 1)
        ours.step()
        theirs.step()
    assert_near(params, others)


def test_a_parameter_may_be_a_view_with_holes(under: OptimizerFactory) -> None:
    for view in (lambda t: t[:, ::2], lambda t: t.t(), lambda t: t[1:, 1:]):
        base = torch.randn(6, 8)
        param, other = Parameter(view(base)), Parameter(view(base).clone())
        ours, theirs = under([param]), under.theirs([other])
        for seed in range(2):
            set_grads([param], seed, [other])
            ours.step()
            theirs.step()
        assert_near([param], [other])


def test_autograd_notices_that_parameters_changed(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    set_grads(params, 0)
    loss = torch.stack([p.square().sum() for p in params]).sum()
    ours.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_several_types_and_later_casts(under: OptimizerFactory) -> None:
    params = parameters() + parameters(1, torch.float64) + parameters(2, torch.bfloat16)
    others = copies(params)
    ours, theirs = under(params), under.theirs(others)
    for seed in range(2):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    assert_near(params[:16], others[:16])
    for param, other in zip(params[16:], others[16:], strict=True):
        torch.testing.assert_close(param, other, rtol=2e-2, atol=2e-2)
