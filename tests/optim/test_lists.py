"""One native call per list; lists are reused until something that they are made from changes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from optim.cases import Case, OptimizerFactory, assert_near, attached_table, copies, parameters, set_grads
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels import native as _native
from sparsekern.optim import base, kept
from sparsekern.optim.kept import PythonSources


@pytest.fixture(params=["native", "python"], autouse=True)
def sources(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation watches the tensors that lists were made from: native or Python."""
    module = _native.load()
    if request.param == "python":
        monkeypatch.setattr(kept._native, "load", lambda: None)
    elif module is None or not _native.exchanges:
        pytest.skip("there are no native sources")
    return str(request.param)


def test_sources_are_native_where_they_can_be(under: OptimizerFactory, sources: str) -> None:
    params = parameters()
    ours = under(params)
    set_grads(params, 0)
    ours.step()
    assert isinstance(ours._kept.sources, PythonSources) == (sources == "python")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Dtype and length of every list that a step passes to a backend."""
    seen: list[tuple[torch.dtype, int]] = []
    real = base.step_

    def counted(op: int, lists: Any, *args: Any) -> None:
        seen.append((lists[0][0].dtype, len(lists[0])))
        real(op, lists, *args)

    monkeypatch.setattr(base, "step_", counted)
    return seen


def test_one_call_for_each_type_of_a_group(under: OptimizerFactory, calls: list[Any]) -> None:
    params = parameters() + parameters(1, torch.float64)
    ours = under([{"params": params[:10]}, {"params": params[10:]}])
    for seed in range(2):
        set_grads(params, seed)
        calls.clear()
        ours.step()
        assert calls == [(torch.float32, 8), (torch.float64, 2), (torch.float64, 6)]


def test_nothing_is_called_without_gradients(under: OptimizerFactory, calls: list[Any]) -> None:
    under(parameters()).step()
    assert calls == []


def test_lists_are_made_once(under: OptimizerFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    ours = under(params)
    made = 0
    real = ours._lists_of

    def counted(*args: Any) -> Any:
        nonlocal made
        made += 1
        return real(*args)

    monkeypatch.setattr(ours, "_lists_of", counted)
    for seed in range(6):
        set_grads(params, seed)
        ours.param_groups[0]["lr"] *= 0.5
        ours.step()
    # Lists are made twice where the first step creates state (SGD's momentum).
    assert made == (2 if ours.state and "step" not in ours.state[params[0]] else 1)


def test_gradients_are_not_kept_alive(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    for seed in range(2):
        set_grads(params, seed)
        grads = [weakref.ref(param.grad) for param in params]
        ours.step()
        ours.zero_grad()
        gc.collect()
        assert [grad() for grad in grads] == [None] * len(grads)


def test_an_optimizer_is_freed_with_its_last_reference(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    set_grads(params, 0)
    ours.step()
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None


def test_an_optimizer_that_its_parameters_lead_to_is_freed(under: OptimizerFactory) -> None:
    params = parameters()
    ours = under(params)
    params[0].register_hook(lambda grad, leads_to=ours: None)
    set_grads(params, 0)
    ours.step()
    gone = weakref.ref(ours)
    del ours, params
    gc.collect()
    assert gone() is None


def _replace_state(optimizer: Any, param: Tensor) -> None:
    if param in optimizer.state:
        optimizer.state[param] = copy.deepcopy(optimizer.state[param])


def _replace_value(optimizer: Any, param: Tensor) -> None:
    for name, value in optimizer.state.get(param, {}).items():
        optimizer.state[param][name] = value * 0.5


def _drop_state(optimizer: Any, param: Tensor) -> None:
    optimizer.state.pop(param, None)


def _drop_all(optimizer: Any, param: Tensor) -> None:
    optimizer.state.clear()


def _swap_states(optimizer: Any, param: Tensor) -> None:
    # Two parameters of one shape, so that only their values show which one was used.
    params = optimizer.param_groups[0]["params"]
    one, two = params[-2], params[-1]
    if one in optimizer.state:
        optimizer.state[one], optimizer.state[two] = optimizer.state[two], optimizer.state[one]


def _lose_gradient(optimizer: Any, param: Tensor) -> None:
    param.grad = None


def _swap_parameters(optimizer: Any, param: Tensor) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def _drop_parameter(optimizer: Any, param: Tensor) -> None:
    optimizer.param_groups[0]["params"].pop(0)


def _move_between_groups(optimizer: Any, param: Tensor) -> None:
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def _replace_data(optimizer: Any, param: Tensor) -> None:
    param.data = param.data * 0.5


def _load(optimizer: Any, param: Tensor) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EDITS = [
    _replace_state,
    _replace_value,
    _drop_state,
    _drop_all,
    _swap_states,
    _lose_gradient,
    _swap_parameters,
    _drop_parameter,
    _move_between_groups,
    _replace_data,
    _load,
]


@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_steps_take_effect(under: OptimizerFactory, edit: Any) -> None:
    def grouped(make: Any, ps: list[Parameter]) -> Any:
        return make([{"params": ps[:-2] + ps[-1:]}, {"params": ps[-2:-1], "lr": 0.01}])

    params = [*parameters(), Parameter(torch.ones(1))]
    others = copies(params)
    pair = (grouped(under, params), params), (grouped(under.theirs, others), others)
    for seed in range(5):
        set_grads(params, seed, others)
        for optimizer, ps in pair:
            if seed in (2, 3):
                edit(optimizer, ps[3])
            optimizer.step()
    assert_near(params, others)


def test_state_in_another_memory_order_is_put_in_the_parameters(under: OptimizerFactory) -> None:
    params, others = parameters(), parameters()
    ours, theirs = under(params), under.theirs(others)
    for seed in range(3):
        set_grads(params, seed, others)
        if seed == 1:
            for optimizer, ps in ((ours, params), (theirs, others)):
                for name, value in optimizer.state.get(ps[0], {}).items():
                    if value.dim():
                        turned = value.contiguous(memory_format=torch.channels_last)
                        optimizer.state[ps[0]][name] = turned
        ours.step()
        theirs.step()
    assert_near(params, others)


def test_state_that_does_not_fit_is_refused(case: Case) -> None:
    params = parameters()
    ours = OptimizerFactory(case, False)(params)
    set_grads(params, 0)
    ours.step()
    names = [name for name in ours.state.get(params[0], {}) if name != "step"]
    for name in names:
        good = ours.state[params[0]][name]
        for bad in (good.double(), good[:1], good.to("meta")):
            ours.state[params[0]][name] = bad
            with pytest.raises(RuntimeError, match=f"optimizer state '{name}': got"):
                ours.step()
        ours.state[params[0]][name] = good
    ours.step()


def test_steps_may_be_numbers_of_any_kind(case: Case) -> None:
    params = parameters()
    ours = OptimizerFactory(case, False)(params)
    set_grads(params, 0)
    ours.step()
    for steps in (3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)):
        for state in ours.state.values():
            if "step" in state:
                state["step"] = steps
        ours.step()
        for state in ours.state.values():
            if "step" in state:
                assert state["step"].dtype == torch.float32
                assert state["step"] == 4


def test_a_model_cast_after_its_first_step_is_refused_until_its_state_is(under: OptimizerFactory) -> None:
    model = torch.nn.Linear(3, 2)
    ours = under(model.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        set_grads(list(model.parameters()), 0)
        if dtype == torch.bfloat16 and ours.state:
            with pytest.raises((RuntimeError, ValueError), match="bfloat16"):
                ours.step()
            ours.state.clear()
        if attached_table(ours) is not None:
            ours.detach()
        ours.step()
