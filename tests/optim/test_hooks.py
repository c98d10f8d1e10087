"""Rows with external optimizers, through hooks around their steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.cases import assert_near, assert_same, copies, parameters, set_grads, snapshot, table_of
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.kernels.rows import LIVE

Make = Callable[[list[Parameter]], Optimizer]

FOREIGN: dict[str, Make] = {
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, maximize=True),
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01), fused=True),
}


@pytest.fixture(params=FOREIGN.values(), ids=FOREIGN)
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


def test_live_rows_do_not_show(make: Make) -> None:
    params, others = parameters(), parameters()
    hooked, plain = make(params), make(others)
    table = table_of(params)
    optim.attach(hooked, table)
    for seed in range(3):
        set_grads(params, seed, others)
        hooked.step()
        plain.step()
    assert_same(snapshot(hooked), snapshot(plain))
    assert table.updates == 3


def test_statistics_are_those_of_our_own_step(make: Make) -> None:
    """The statistics are equal for the same weights and gradients; the weight updates may differ."""
    params, others = parameters(), parameters()
    hooked = make(params)
    ours = optim.SGD(others, maximize=hooked.defaults.get("maximize", False))
    tables = table_of(params), table_of(others)
    for optimizer, table in zip((hooked, ours), tables, strict=True):
        optim.attach(optimizer, table)
    for seed in range(3):
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)
        set_grads(params, seed, others)
        ours.step()
        hooked.step()
    mine, yours = (t.state_dict() for t in tables)
    for name, value in yours.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_penalty_fade_and_mask(make: Make) -> None:
    params, others = parameters(), parameters()
    hooked, plain = make(params), make(others)
    table = table_of(params)
    table.penalty.fill_(0.25)
    table.countdown[1::5] = 2
    table.countdown[2::5] = 0
    table.refresh()
    optim.attach(hooked, table)
    start = copies(params)
    for seed in range(3):
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)
        plain.load_state_dict(copy.deepcopy(hooked.state_dict()))
        before = table.countdown.clone()
        set_grads(params, seed, others)
        hooked.step()
        plain.step()
        shrunk = torch.where(before > 0, (before - 1) / before, 1) * (1 - 0.01 * 0.25)
        factor = torch.where(before == 0, 0, shrunk)
        for view, param, other in zip(table.views, params, others, strict=False):
            shape = [1] * param.dim()
            shape[view.dim] = -1
            assert_near([param], [other * factor[view.slice].reshape(shape)])
    assert (table.countdown[1::5] == 0).all()
    assert (table.countdown[0::5] == LIVE).all()
    assert start[-1].dim() == 0


def test_masked_rows_and_their_state_are_zero_from_the_start_and_after_a_load(make: Make) -> None:
    params = parameters()
    hooked = make(params)
    set_grads(params, 0)
    hooked.step()
    table = table_of(params)
    table.countdown[:3] = 0
    table.refresh()
    optim.attach(hooked, table)

    def values() -> list[Tensor]:
        fitting = [v for v in hooked.state[params[0]].values() if v.shape == params[0].shape]
        return [v[:3] for v in (params[0], *fitting)]

    assert not any(v.any() for v in values())
    state = copy.deepcopy(hooked.state_dict())
    for value in state["state"][0].values():
        if isinstance(value, Tensor) and value.shape == params[0].shape:
            value.fill_(1.0)
    hooked.load_state_dict(state)
    assert not any(v.any() for v in values())


def test_parameters_without_gradient_are_left_alone(make: Make) -> None:
    params = parameters()
    hooked = make(params)
    table = table_of(params)
    table.countdown.fill_(3)
    table.refresh()
    optim.attach(hooked, table)
    set_grads(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    hooked.step()
    assert_same([params[0].detach()], [before])
    assert (table.countdown[:6] == 3).all()
    assert (table.countdown[6:] == 2).all()
    assert not table.sums[:6].any()


@pytest.mark.parametrize("keyword", [True, False])
def test_statistics_follow_the_closure(keyword: bool) -> None:
    for kind in (torch.optim.SGD, torch.optim.LBFGS):
        param = Parameter(torch.tensor([[2.0, 1.0], [0.5, 0.25]]))
        table = table_of([param])
        hooked = kind([param], lr=0.01)
        optim.attach(hooked, table)
        first = param.detach().clone()
        calls = 0

        def closure(param: Parameter = param, hooked: Optimizer = hooked) -> Tensor:
            nonlocal calls
            calls += 1
            hooked.zero_grad()
            loss = param.square().sum()
            loss.backward()
            return loss

        loss = hooked.step(closure=closure) if keyword else hooked.step(closure)
        assert loss == first.square().sum()
        assert calls >= 1
        assert table.updates == 1
        assert_near([table.sums[:, 2]], [(2 * first).square().sum(1)])


def test_a_closure_that_fails_leaves_nothing_behind(make: Make) -> None:
    params = parameters()
    hooked = make(params)
    table = table_of(params)
    optim.attach(hooked, table)
    set_grads(params, 0)

    def closure() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hooked.step(closure)
    assert table.updates == 0
    hooked.step()
    assert table.updates == 1


def test_scaler(make: Make) -> None:
    """GradScaler skips steps of plain optimizers; it calls fused ones and sets two attributes on them."""
    params, others = parameters(), parameters()
    hooked, plain = make(params), make(others)
    tables = table_of(params), table_of(others)
    for optimizer, table in zip((hooked, plain), tables, strict=True):
        optim.attach(optimizer, table)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for seed in range(3):
        set_grads(params, seed, others)
        for param in params:
            param.grad *= 64.0
        scaler.scale(torch.ones(()))
        scaler.step(hooked)
        scaler.update()
        plain.step()
    assert_near(params, others)
    assert_near([tables[0].sums, tables[0].activity], [tables[1].sums, tables[1].activity])


def test_found_inf_changes_nothing(make: Make) -> None:
    params = parameters()
    hooked = make(params)
    table = table_of(params)
    table.countdown[::2] = 3
    table.refresh()
    optim.attach(hooked, table)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for seed in range(2):
        set_grads(params, seed)
        before = snapshot(hooked, table)
        if seed == 1:
            params[0].grad[0] = torch.inf
        scaler.scale(torch.ones(()))
        scaler.step(hooked)
        scaler.update()
    stepped = [v for v in before if isinstance(v, Tensor)]
    assert_same([v for v in snapshot(hooked, table) if isinstance(v, Tensor)], stepped)


def test_lr_zero_counts_nothing(make: Make) -> None:
    params = parameters()
    hooked = make(params)
    table = table_of(params)
    table.countdown[::2] = 3
    table.refresh()
    optim.attach(hooked, table)
    hooked.param_groups[0]["lr"] = 0.0
    set_grads(params, 0)
    hooked.step()
    assert table.updates == 0
    assert (table.countdown[::2] == 3).all()
    assert table.threshold.isinf().all()


def test_groups_have_their_own_lr(make: Make) -> None:
    params = parameters()
    hooked = make(params[:3])
    hooked.add_param_group({"params": params[3:], "lr": 0.0})
    table = table_of(params)
    table.countdown.fill_(3)
    table.refresh()
    optim.attach(hooked, table)
    set_grads(params, 0)
    hooked.step()
    assert (table.countdown[:24] == 2).all()
    assert (table.countdown[24:] == 3).all()


def test_hooks_come_once_and_removed_copied_and_pickled_ones_are_gone(make: Make) -> None:
    params = parameters()
    hooked = make(params)
    table = table_of(params)
    optim.attach(hooked, table).remove()
    handle = optim.attach(hooked, table)
    with pytest.raises(RuntimeError, match="one is attached already"):
        optim.attach(hooked, table)
    for twin in (copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))):
        set_grads(twin.param_groups[0]["params"], 0)
        twin.step()
    handle.remove()
    set_grads(params, 0)
    hooked.step()
    hooked.load_state_dict(hooked.state_dict())
    assert table.updates == 0


def test_optimizers_without_lr_or_maximize() -> None:
    class Halve(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for param in self.param_groups[0]["params"]:
                param.mul_(0.5)

    param = Parameter(torch.ones(4, 2))
    table = table_of([param])
    table.penalty[1] = 0.5
    table.countdown[3] = 0
    table.refresh()
    optimizer = Halve([param])
    optim.attach(optimizer, table)
    set_grads([param], 0)
    optimizer.step()
    assert param[:, 0].tolist() == [0.5, 0.25, 0.5, 0.0]


def test_what_is_no_optimizer_or_has_other_parameters_is_refused(make: Make) -> None:
    params = parameters()
    with pytest.raises(TypeError, match=r"optimizer: got list, expected a torch\.optim\.Optimizer"):
        optim.attach(params, table_of(params))
    with pytest.raises(ValueError, match="rows of 7 parameters"):
        optim.attach(make(parameters()), table_of(params))


def test_sparse_gradients_of_tracked_parameters_are_refused_before_the_step() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.parameters()))
    optim.attach(optimizer, table_of(embedding.parameters()))
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises((TypeError, RuntimeError), match=r"grads\[0\]|sparse"):
        optimizer.step()
    assert_same([embedding.weight.detach()], [before])
