"""The behaviour of ``torch.optim.Optimizer`` that other code relies on, with and without rows."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from optim.cases import (
    Case,
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
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparsekern import optim


def test_signatures_are_those_of_torch(case: Case) -> None:
    def shape(cls: type) -> list[tuple[Any, ...]]:
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(case.ours) == shape(case.theirs)
    assert list(inspect.signature(case.ours.step).parameters) == ["self", "closure"]


def test_defaults_groups_and_repr_are_those_of_torch(case: Case) -> None:
    ours, theirs = case.ours(parameters()), case.theirs(parameters())
    assert ours.defaults == theirs.defaults
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"fused": True, "foreach": True}, RuntimeError),
        ({"fused": True, "differentiable": True}, RuntimeError),
        ({"differentiable": True}, RuntimeError),
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": torch.tensor([0.1, 0.2])}, ValueError),
        ({"weight_decay": -1.0}, ValueError),
    ],
)
def test_bad_options_are_refused(case: Case, options: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        case.ours(parameters(), **options)


@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_implementation_flags_change_nothing(under: OptimizerFactory, flags: dict[str, bool]) -> None:
    params, others = parameters(), parameters()
    ours, flagged = under(params), under(others, **flags)
    for seed in range(2):
        set_grads(params, seed, others)
        ours.step()
        flagged.step()
    assert_same(snapshot(ours), snapshot(flagged))


@pytest.mark.parametrize("lr", [torch.tensor(0.05), torch.tensor([0.05])])
def test_lr_may_be_a_tensor(under: OptimizerFactory, lr: Tensor) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under(params, lr=lr), under.theirs(others, lr=0.05)
    for seed in range(3):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    assert_near(params, others)
    assert ours.param_groups[0]["lr"] is lr


def test_parameters_may_be_named(under: OptimizerFactory) -> None:
    ours = under([("a", Parameter(torch.ones(2))), ("b", Parameter(torch.ones(3)))])
    ours.add_param_group({"params": [("c", Parameter(torch.ones(1)))]})
    assert [group["param_names"] for group in ours.param_groups] == [["a", "b"], ["c"]]
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["a", "b"]


def test_groups_have_their_own_options_and_may_come_later(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()

    def grouped(make: Any, ps: list[Parameter]) -> Any:
        groups = [{"params": ps[:3], "lr": 0.01}, {"params": iter(ps[3:5]), "weight_decay": 0.5}]
        return make(groups)

    ours, theirs = grouped(under, params), grouped(under.theirs, others)
    set_grads(params, 0, others)
    ours.step()
    theirs.step()
    for optimizer, ps in ((ours, params), (theirs, others)):
        optimizer.add_param_group({"params": ps[5:], "lr": 0.5})
    for seed in (1, 2):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    assert_near(params, others)


def test_a_parameter_belongs_to_one_group(under: OptimizerFactory) -> None:
    param = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        under([{"params": [param]}, {"params": [param]}])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group_is_stepped_twice(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under([params[0]] * 2), under.theirs([others[0]] * 2)
    for seed in range(3):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    assert_near(params, others)


def test_options_are_read_from_the_group_at_every_step(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under(params), under.theirs(others)
    edits: list[dict[str, Any]] = [
        {},
        {"lr": 0.5},
        {"weight_decay": 0.5, "lr": torch.tensor(0.01)},
        {"maximize": True},
        {"momentum": 0.5} if "momentum" in ours.defaults else {"betas": (0.1, 0.2)},
        {"momentum": 0} if "momentum" in ours.defaults else {"decoupled_weight_decay": False},
        {"momentum": 0.7, "nesterov": True, "dampening": 0},
    ]
    for seed, edit in enumerate(edits):
        for group in ours.param_groups + theirs.param_groups:
            group.update(edit)
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
        assert_near(params, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_state_has_the_names_shapes_types_and_layout_of_torch(
    under: OptimizerFactory, dtype: torch.dtype
) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    ours, theirs = under(params), under.theirs(others)
    set_grads(params, 0, others)
    ours.step()
    theirs.step()
    for param, other in zip(params, others, strict=True):
        mine, yours = ours.state.get(param, {}), theirs.state.get(other, {})
        assert list(mine) == list(yours)
        for name, value in mine.items():
            assert (value.shape, value.dtype) == (yours[name].shape, yours[name].dtype)
            assert not value.requires_grad
            if name != "step":
                assert value.stride() == param.stride()


def test_pickles_and_deep_copies_go_on_alike_without_a_table(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    set_grads(params, 0)
    ours.step()
    twins = [pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)]
    for twin in twins:
        set_grads(params, 1, [p for group in twin.param_groups for p in group["params"]])
        twin.step()
        assert twin._step_supports_amp_scaling
        assert attached_table(twin) is None
    ours.step()
    for twin in twins:
        assert_same(snapshot(twin), snapshot(ours))


def test_groups_from_before_an_option_existed_get_it(case: Case) -> None:
    params = parameters()
    ours = case.ours(params, **case.options)
    state = ours.__getstate__()
    for group in state["param_groups"]:
        for name in ("maximize", "foreach", "fused", "differentiable", "capturable"):
            group.pop(name, None)
    ours.__setstate__(state)
    theirs = case.theirs(parameters(), **case.options)
    ignored = {"params", "fused"}  # torch gives SGD False and Adam None there, which mean the same
    have, expected = ours.param_groups[0], theirs.param_groups[0]
    assert {k: v for k, v in have.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }
    set_grads(params, 0)
    ours.step()


def test_a_long_count_of_steps_survives_a_load_into_bfloat16(under: OptimizerFactory) -> None:
    params = parameters(dtype=torch.bfloat16)
    ours = under(params)
    set_grads(params, 0)
    ours.step()
    state = copy.deepcopy(ours.state_dict())
    for value in state["state"].values():
        if "step" in value:
            value["step"].fill_(100001.0)
    ours.load_state_dict(state)
    set_grads(params, 1)
    ours.step()
    steps = [state["step"] for state in ours.state.values() if "step" in state]
    assert all(step.item() == 100002 and step.dtype == torch.float32 for step in steps)


def test_hooks_fire_once_a_step(under: OptimizerFactory) -> None:
    torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1)
    torch.optim.AdamW([Parameter(torch.ones(1))])
    params = parameters()
    ours = under(params)
    calls: list[str] = []
    ours.register_step_pre_hook(lambda *_: calls.append("pre"))
    ours.register_step_post_hook(lambda *_: calls.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
    ]
    set_grads(params, 0)
    ours.step()
    for handle in handles:
        handle.remove()
    assert sorted(calls) == ["all post", "all pre", "post", "pre"]
    ours.register_state_dict_pre_hook(lambda _: calls.append("save"))
    ours.register_load_state_dict_post_hook(lambda _: calls.append("load"))
    ours.load_state_dict(ours.state_dict())
    assert calls[4:] == ["save", "load"]


def test_closure_runs_with_gradients_on_and_its_loss_comes_back(under: OptimizerFactory) -> None:
    param = Parameter(torch.full((3,), 2.0))
    ours = under([param])

    def closure() -> Tensor:
        ours.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert ours.step(closure).item() == 12.0
    assert ours.step(closure=closure) < 12.0
    assert ours.step() is None


def test_schedulers_drive_it(under: OptimizerFactory) -> None:
    for lr in (0.1, torch.tensor(0.1)):
        params, others = parameters(), parameters()
        ours = under(params, lr=lr)
        theirs = under.theirs(others, lr=copy.deepcopy(lr))
        pairs = [(o, lr_scheduler.StepLR(o, 2, 0.5)) for o in (ours, theirs)]
        for seed in range(5):
            set_grads(params, seed, others)
            for optimizer, scheduler in pairs:
                optimizer.step()
                scheduler.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == pytest.approx(0.025)
        assert_near(params, others)


def test_parameters_without_gradient_are_left_alone(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params, weight_decay=0.1)
    table = attached_table(ours)
    before = copies(params)
    set_grads(params, 0)
    for param in params[::2]:
        param.grad = None
    ours.step()
    for i, (param, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, old) == (i % 2 == 0)
        if i % 2 == 0:
            assert not ours.state.get(param)
        if table is not None and id(param) in table.index:
            assert (table.sums[table.index[id(param)].slice, 3] > 0).all() == (i % 2 == 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(under: OptimizerFactory, set_to_none: bool) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under(params, fused=True), under.theirs(others)
    for seed in range(3):
        ours.zero_grad(set_to_none=set_to_none)
        for i, param in enumerate(params):
            grad = torch.full_like(param, 1.0 + seed + i)
            param.grad = grad if param.grad is None else param.grad.add_(grad)
            others[i].grad = grad.clone()
        ours.step()
        theirs.step()
    assert_near(params, others)


def test_capturable_steps_alike(under: OptimizerFactory) -> None:
    if "capturable" not in under.case.ours([Parameter(torch.ones(1))]).defaults:
        return
    params, others = parameters(), parameters()
    ours, theirs = under(params, capturable=True), under.theirs(others)
    for seed in range(3):
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
    assert_near(params, others)


@pytest.mark.parametrize("foreach", [None, True])
def test_betas_may_be_tensors(foreach: bool | None) -> None:
    betas = (torch.tensor([[0.8]]), torch.tensor(0.9))
    for ours, theirs in ((optim.Adam, torch.optim.Adam), (optim.AdamW, torch.optim.AdamW)):
        if foreach:
            with pytest.raises(ValueError, match=r"betas\[0\] as a Tensor"):
                ours(parameters(), betas=betas, foreach=True)
            continue
        params, others = parameters(), parameters()
        pair = ours(params, betas=betas), theirs(others, betas=(0.8, 0.9))
        for seed in range(3):
            set_grads(params, seed, others)
            for optimizer in pair:
                optimizer.step()
        assert_near(params, others)


def test_one_optimizer_per_parameter_in_the_backward_pass(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    each = {param: under([param]) for param in params}
    theirs = under.theirs(others)

    def step(param: Tensor) -> None:
        each[param].step()
        each[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        torch.stack([p.square().sum() for p in params]).sum().backward()
        torch.stack([p.square().sum() for p in others]).sum().backward()
        theirs.step()
        theirs.zero_grad()
    assert all(param.grad is None for param in params)
    assert_near(params, others)
