"""A table attached to an optimizer: its statistics, its effect on the step, and its absence from copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from optim.cases import (
    Case,
    OptimizerFactory,
    assert_near,
    assert_same,
    copies,
    parameters,
    set_grads,
    snapshot,
    table_of,
)
from torch import Tensor
from torch.nn import Parameter

from sparsekern import optim
from sparsekern.kernels.rows import LIVE, RowTable

LATER = ("activity", "threshold", "channel_dot", "channel_dot_sq", "updates", "countdown")


@pytest.fixture
def attached(case: Case) -> tuple[list[Parameter], optim.RowOptimizer, RowTable]:
    """Parameters after two steps, with live, fading and masked rows."""
    params = parameters()
    optimizer = OptimizerFactory(case, attached=False)(params, weight_decay=0.1)
    table = table_of(params)
    table.countdown[1::5] = 3
    table.countdown[2::5] = 0
    table.penalty[::3] = 0.5
    table.refresh()
    optimizer.attach(table)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    return params, optimizer, table


def rows_of(tensor: Tensor, table: RowTable, param: Tensor, which: Tensor) -> Tensor:
    view = table.index[id(param)]
    return tensor.detach().movedim(view.dim, 0)[which[view.slice]]


def masked_values(optimizer: optim.RowOptimizer, table: RowTable) -> Tensor:
    masked = table.countdown == 0
    parts = [torch.zeros(0)]
    for view in table.views:
        values = [view.param, *optim.state_tensors(optimizer.state)(view.param)]
        fitting = [value for value in values if value.shape == view.param.shape]
        parts += [rows_of(v, table, view.param, masked).reshape(-1) for v in fitting]
    return torch.cat(parts)


def test_rows_in_every_state_do_what_they_should(attached: Any) -> None:
    params, optimizer, table = attached
    assert len(masked_values(optimizer, table)) > 0
    assert not masked_values(optimizer, table).any()
    assert table.updates == 2
    assert (table.countdown[1::5] == 1).all()
    set_grads(params, 2)
    optimizer.step()
    assert (table.countdown[1::5] == 0).all()
    assert not masked_values(optimizer, table).any()
    live = table.countdown == LIVE
    for view in table.views:
        assert rows_of(view.param, table, view.param, live).all()


def test_live_rows_do_not_show(case: Case) -> None:
    params, others = parameters(), parameters()
    plain, ours = OptimizerFactory(case, False)(params), OptimizerFactory(case, False)(others)
    ours.attach(table_of(others[::2]))
    for seed in range(3):
        set_grads(params, seed, others)
        plain.step()
        ours.step()
    assert_same(snapshot(plain), snapshot(ours))


def test_statistics_are_those_of_the_gradients(case: Case) -> None:
    params = parameters()
    optimizer = OptimizerFactory(case, False)(params)
    table = table_of(params)
    optimizer.attach(table)
    before = copies(params)
    set_grads(params, 0)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        if param.dim():
            view = table.index[id(param)]
            grad, old = (t.movedim(view.dim, 0).reshape(view.rows, -1) for t in (param.grad, old))
            expected = torch.stack([grad.square().sum(1), old.square().sum(1)], 1)
            assert_near([table.sums[view.slice][:, 2:]], [expected])
            assert_near([table.channel_dot[view.slice]], [0.5 * (grad * old).sum(1)])


def test_maximize_turns_the_sign_of_dot(case: Case) -> None:
    tables = []
    for maximize in (False, True):
        params = parameters()
        optimizer = OptimizerFactory(case, False)(params, maximize=maximize)
        tables.append(table_of(params))
        optimizer.attach(tables[-1])
        set_grads(params, 0)
        optimizer.step()
    assert_same([tables[0].channel_dot], [-tables[1].channel_dot])
    assert_same([tables[0].sums], [tables[1].sums])


def test_groups_and_types_share_one_table_and_one_count(case: Case) -> None:
    params = [*parameters(), *parameters(1, torch.bfloat16)]
    optimizer = OptimizerFactory(case, False)([{"params": params[:5]}, {"params": params[5:], "lr": 0.01}])
    table = table_of(params)
    optimizer.attach(table)
    for seed in range(3):
        set_grads(params, seed)
        optimizer.step()
    assert table.updates == 3
    assert (table.sums[:, 3] > 0).all()


def test_loading_state_leaves_masked_rows_zero(attached: Any) -> None:
    params, optimizer, table = attached
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        for name in values:
            values[name] = torch.full_like(values[name], 7.0)
    with torch.no_grad():
        params[0].fill_(7.0)
    optimizer.load_state_dict(state)
    assert not masked_values(optimizer, table).any()
    set_grads(params, 3)
    optimizer.step()
    assert not masked_values(optimizer, table).any()
    assert all((s["step"] == 8).all() for s in optimizer.state.values() if "step" in s)


def test_state_dict_knows_nothing_of_the_table(attached: Any, case: Case) -> None:
    _, optimizer, _ = attached
    plain = OptimizerFactory(case, False)(parameters(), weight_decay=0.1)
    set_grads(plain.param_groups[0]["params"], 0)
    plain.step()
    mine, yours = optimizer.state_dict(), plain.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert {k: list(v) for k, v in mine["state"].items()} == {k: list(v) for k, v in yours["state"].items()}


def test_copies_step_without_the_table(attached: Any) -> None:
    _, optimizer, table = attached
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = snapshot(optimizer, table)
        set_grads(twin.param_groups[0]["params"], 5)
        twin.step()
        assert_same(snapshot(optimizer, table), before)
        other = table_of(twin.param_groups[0]["params"])
        twin.attach(other)
        twin.step()
        assert other.updates == 1


def test_found_inf_changes_nothing(attached: Any) -> None:
    params, optimizer, table = attached
    set_grads(params, 3)
    params[0].grad.view(-1)[0] = torch.inf
    before = snapshot(optimizer, table)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(4.0)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    assert_same(snapshot(optimizer, table), before)


def test_a_step_with_lr_zero_moves_no_parameter_and_no_row(attached: Any) -> None:
    params, optimizer, table = attached
    for lr in (0.0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params, 3)
        before = copies(params)
        later = [getattr(table, name).clone() for name in LATER]
        optimizer.step()
        assert_same([p.detach() for p in params], [p.detach() for p in before])
        assert_same([getattr(table, name) for name in LATER], later)


def test_a_gradient_that_is_not_finite_steps_as_in_torch_and_stays_out_of_the_statistics(
    case: Case,
) -> None:
    params, others = parameters(), parameters()
    ours, theirs = OptimizerFactory(case, False)(params), OptimizerFactory(case, False).theirs(others)
    table = table_of(params)
    ours.attach(table)
    for seed in range(2):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    activity = table.activity.clone()
    set_grads(params, 2, others)
    params[0].grad[2, 0, 0, 0] = others[0].grad[2, 0, 0, 0] = torch.nan
    ours.step()
    theirs.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert params[0].isnan().any()
    assert table.nonfinite == 1
    assert table.activity[2] == activity[2]
    for name in LATER[:-1]:
        assert not getattr(table, name).isnan().any()


def test_detach_goes_on_as_torch(attached: Any, case: Case) -> None:
    params, optimizer, table = attached
    optimizer.detach()
    others = copies(params)
    theirs = OptimizerFactory(case, False).theirs(others)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = table.updates.clone()
    for seed in range(2):
        set_grads(params, seed, others)
        optimizer.step()
        theirs.step()
    assert_near(params, others)
    assert table.updates == before


def test_handles_detach_only_their_own_table(case: Case) -> None:
    params = parameters()
    optimizer = OptimizerFactory(case, False)(params)
    first, second = table_of(params), table_of(params)
    handle = optim.attach(optimizer, first)
    for table in (first, second):
        with pytest.raises(RuntimeError, match="one is attached already"):
            optim.attach(optimizer, table)
    handle.remove()
    optim.attach(optimizer, second)
    handle.remove()
    set_grads(params, 0)
    optimizer.step()
    assert (first.updates, second.updates) == (0, 1)


def test_a_table_of_other_parameters_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="rows of 7 parameters, expected at least one"):
        optim.attach(OptimizerFactory(case, False)(parameters()), table_of(parameters()))


def test_steps_without_any_gradient_are_not_counted(attached: Any) -> None:
    _, optimizer, table = attached
    optimizer.zero_grad()
    before = snapshot(optimizer, table)
    optimizer.step()
    assert_same(snapshot(optimizer, table), before)


def test_a_first_gradient_may_come_late(case: Case) -> None:
    params, others = parameters(), parameters()
    ours, theirs = OptimizerFactory(case, False)(params), OptimizerFactory(case, False).theirs(others)
    ours.attach(table_of(params))
    for seed in range(4):
        set_grads(params, seed, others)
        for i in range(seed + 2, len(params)):
            params[i].grad = others[i].grad = None
        ours.step()
        theirs.step()
    assert_near(params, others)
