"""Options of a step: made once per group, and after a change; and the way of a step to native code."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optim.cases import assert_same, attached_table, copies, parameters, set_grads, snapshot, table_of

import sparsekern
from sparsekern import optim
from sparsekern.kernels import native
from sparsekern.kernels.backends.cpu import step as cpu_step
from sparsekern.kernels.options import OPTIONS
from sparsekern.optim import base

PACKAGE = Path(sparsekern.__file__).parent


class _Recording:
    """The native module, which records the Python frames that lead to a step."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.ways: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def step(self, *arguments: Any) -> Any:
        way: list[str] = []
        frame = sys._getframe(1)
        while True:
            code = frame.f_code
            way.append(f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_name}")
            if way[-1] == "optim/base.py:step":
                break
            assert frame.f_back is not None
            frame = frame.f_back
        self.ways.append(way[::-1])
        return self._module.step(*arguments)


STEPS: list[tuple[type[optim.RowOptimizer], dict[str, Any]]] = [
    (optim.SGD, {}),
    (optim.SGD, {"momentum": 0.9}),
    (optim.Adam, {}),
    (optim.AdamW, {"amsgrad": True, "lr": torch.tensor(0.1)}),
]


@pytest.mark.skipif(native.load() is None or not native.exchanges, reason="there is no direct native call")
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(("kind", "options"), STEPS)
def test_a_step_is_at_most_seven_frames(
    kind: type[optim.RowOptimizer], options: dict[str, Any], tables: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the first step, which makes state, lists and a plan, has few frames that call each other."""
    params = parameters()
    optimizer = kind(params, **options)
    if tables:
        optimizer.attach(table_of(params))
    recording = _Recording(native.load())
    monkeypatch.setattr(cpu_step, "_C", recording)
    for seed in range(3):
        set_grads(params, seed)
        optimizer.step()
    assert len(recording.ways) == 3
    assert len(recording.ways[0]) <= 7
    for way in recording.ways[1:]:
        assert way == [
            "optim/base.py:step",
            "optim/base.py:_step_all",
            "optim/base.py:_step_list",
            "kernels/ops.py:step_",
            "kernels/backends/planned.py:step_",
            "kernels/backends/cpu/step.py:run",
        ]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every list that an optimizer steps."""
    found: list[Any] = []
    step_ = base.step_

    def recorded(op: int, lists: Any, options: Any, *arguments: Any) -> None:
        found.append(options)
        step_(op, lists, options, *arguments)

    monkeypatch.setattr(base, "step_", recorded)
    return found


CHANGES: dict[str, tuple[type[optim.RowOptimizer], str, Any]] = {
    "lr": (optim.Adam, "lr", 0.25),
    "betas": (optim.Adam, "betas", (0.5, 0.75)),
    "eps": (optim.AdamW, "eps", 0.25),
    "decay": (optim.AdamW, "weight_decay", 0.25),
    "decoupled": (optim.Adam, "decoupled_weight_decay", True),
    "amsgrad": (optim.Adam, "amsgrad", True),
    "maximize": (optim.SGD, "maximize", True),
    "momentum": (optim.SGD, "momentum", 0.5),
    "nesterov": (optim.SGD, "nesterov", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_options_are_made_once_and_after_a_change(used: list[Any], change: str) -> None:
    kind, key, value = CHANGES[change]
    params = parameters()[:4]
    options = {"momentum": 0.9} if kind is optim.SGD else {"weight_decay": 0.1}
    optimizer = kind([{"params": params[:2]}, {"params": params[2:]}], lr=0.125, **options)

    def options_of_steps(count: int) -> list[Any]:
        used.clear()
        for seed in range(count):
            set_grads(params, seed)
            optimizer.step()
        return used[:]

    # The first step of SGD makes its state.
    one, other = options_of_steps(2)[-2:]
    assert all(found is (one, other)[i % 2] for i, found in enumerate(options_of_steps(3)))
    optimizer.param_groups[1][key] = value
    first, changed, *later = options_of_steps(3)
    assert first is one and all(found is (one, changed)[i % 2] for i, found in enumerate(later))
    assert changed != other
    optimizer.param_groups[1][key] = optimizer.defaults[key]
    assert options_of_steps(1) == [one, other]


@pytest.mark.parametrize("how", ["tensor betas", "list of betas", "tensor rate", "tensor decay"])
def test_values_that_change_in_place_are_read_at_every_step(how: str) -> None:
    """Each step equals the step of an optimizer that was made with the current values."""
    params = parameters()[:3]
    others = copies(params)
    changing: Any = {
        "tensor betas": (torch.tensor(0.5), torch.tensor(0.5)),
        "list of betas": [0.5, 0.5],
        "tensor rate": torch.tensor(0.5),
        "tensor decay": torch.tensor(0.5),
    }[how]
    key = {"tensor rate": "lr", "tensor decay": "weight_decay"}.get(how, "betas")
    kind = optim.SGD if key == "weight_decay" else optim.Adam
    ours, theirs = kind(params, lr=0.1), kind(others, lr=0.1)
    ours.param_groups[0][key] = changing
    for seed, value in enumerate((0.25, 0.75, 0.125)):
        if key == "betas" and isinstance(changing, list):
            changing[:] = [value, value]
        else:
            for entry in changing if isinstance(changing, tuple) else (changing,):
                entry.fill_(value)
        theirs.param_groups[0][key] = (value, value) if key == "betas" else value
        set_grads(params, seed, others)
        ours.step()
        theirs.step()
        assert_same(params, others)


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(optim.Adam, "eps", -1.0), (optim.SGD, "momentum", float("nan"))]
)
def test_a_value_out_of_range_is_refused_by_its_name(
    kind: type[optim.RowOptimizer], key: str, value: float
) -> None:
    """A group may be changed after the constructor has checked it."""
    params = parameters()[:2]
    optimizer = kind(params)
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0][key] = value
    before = snapshot(optimizer, attached_table(optimizer))
    with pytest.raises(ValueError, match=f"^{key}: got {value}, expected a"):
        optimizer.step()
    assert_same(snapshot(optimizer, attached_table(optimizer)), before)


def test_a_copy_has_its_own_options(used: list[Any]) -> None:
    params = parameters()[:2]
    optimizer = optim.AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["lr"] = 0.5
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    twin.step()
    optimizer.step()
    assert [options.lr for options in used] == [1e-3, 0.5, 1e-3]


def test_every_option_has_its_place_in_a_group() -> None:
    """A field without an entry in the groups would never be read."""
    for kind in (optim.SGD, optim.Adam, optim.AdamW):
        optimizer = kind(parameters()[:1])
        options = optimizer._options.make(optimizer.param_groups[0], torch.device("cpu"))
        assert type(options) is OPTIONS[optimizer._OP]
