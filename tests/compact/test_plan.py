from __future__ import annotations

import json
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compact.networks import KEPT, Chain, chain_plan
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.compact import Plan, TensorPlan, make_plan
from sparsekern.graph import Group
from sparsekern.graph.blocks import emptied, kept_blocks


@st.composite
def tensor_plans(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> TensorPlan:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    keep = {}
    for dim, size in enumerate(shape):
        if draw(st.booleans()):
            indices = draw(st.sets(st.integers(0, size - 1), min_size=1))
            keep[dim] = np.array(sorted(indices))
    return TensorPlan(shape, keep)


@given(st.dictionaries(st.text(min_size=1), tensor_plans()))
def test_json_gives_the_plan_back(tensors: dict[str, TensorPlan]) -> None:
    plan = Plan(tensors)
    assert Plan.from_json(plan.to_json()) == plan


@given(st.data())
def test_two_plans_in_a_row_do_what_their_composition_does(data: st.DataObject) -> None:
    first = data.draw(tensor_plans())
    second = data.draw(tensor_plans(first.new_shape))
    array = np.arange(np.prod(first.shape, dtype=int)).reshape(first.shape)
    both = Plan({"a": first}).then(Plan({"a": second, "b": second})).tensors
    np.testing.assert_array_equal(
        take(take(array, first), second),
        take(array, both["a"]),
    )
    assert both["b"] == second


def take(array: np.ndarray[Any, Any], part: TensorPlan) -> np.ndarray[Any, Any]:
    for dim, indices in part.keep.items():
        array = array.take(indices, axis=dim)
    return array


def test_indices_are_written_once_and_as_runs() -> None:
    document = json.loads(chain_plan(Chain()).to_json())
    assert document["indices"] == ["0,3-5,7"]
    assert document["tensors"]["up.weight"] == {"shape": [8, 6, 2, 2], "keep": {"0": 0}}


def test_a_whole_dimension_is_not_listed() -> None:
    part = TensorPlan((3, 2), {0: np.arange(3), 1: np.array([1])})
    assert list(part.keep) == [1]
    assert part.new_shape == (3, 1)
    assert Plan({"a": TensorPlan((3,))}).removes_nothing
    assert not Plan({"a": part}).removes_nothing


def test_a_plan_is_plain_data() -> None:
    indices = np.array([0, 2])
    part = TensorPlan((3,), {0: indices})
    indices[0] = 1
    np.testing.assert_array_equal(part.keep[0], [0, 2])
    with pytest.raises(ValueError, match="read-only"):
        part.keep[0][0] = 1
    plan = Plan({"a": part})
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan != Plan({"a": TensorPlan((3,))})
    assert "a: [3] -> [2]" in str(plan)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({2: [0]}, "dimension 2 does not exist"),
        ({-1: [0]}, "dimension -1 does not exist"),
        ({0: []}, "at least one"),
        ({0: [0.0, 1.0]}, "float64"),
        ({0: [True, False, True]}, "bool"),
        ({0: [[0], [1]]}, r"\[2, 1\]"),
        ({0: [0, 3]}, r"in \[0, 3\)"),
        ({0: [-1, 1]}, r"in \[0, 3\)"),
        ({0: [1, 0]}, "increasing"),
        ({0: [1, 1]}, "increasing"),
    ],
)
def test_wrong_indices_are_refused(keep: dict[int, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorPlan((3, 2), {dim: np.array(indices) for dim, indices in keep.items()})


def changed(**changes: object) -> str:
    document = json.loads(Plan({"a": TensorPlan((4,), {0: np.array([0, 2])})}).to_json())
    return json.dumps({**document, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "^text: got no valid JSON"),
        ("[]", "is not a plan"),
        ("{}", "is not a plan"),
        (changed(version=4), "version 4, expected 3"),
        (changed(indices={}), "got dict as 'indices'"),
        (changed(indices=["0--1"]), "expected runs"),
        (changed(indices=["0,2\n"]), "expected runs"),
        (changed(indices=["0-99999999999"]), "^text: got 100000000000 indices, expected no more"),
        (changed(indices=["2-0"]), "'a': keep: .*at least one"),
        (changed(indices=["0,9"]), r"'a': keep: .*\[0, 4\)"),
        (changed(tensors=[]), "got list as 'tensors'"),
        (changed(tensors={"a": 1}), "'a': text: got NoneType as 'shape'"),
        (changed(tensors={"a": {"shape": [4.5], "keep": {}}}), "'a': shape"),
        (changed(tensors={"a": {"shape": [4], "keep": {"x": 0}}}), "'a': keep: got 'x'"),
        (changed(tensors={"a": {"shape": [4], "keep": {"0": 1}}}), "'a': keep: got '0': 1"),
        (changed(tensors={"a": {"shape": [4], "keep": {"1": 0}}}), "dimension 1 does not exist"),
    ],
)
def test_damaged_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_a_later_plan_of_other_shapes_is_refused() -> None:
    plan = Plan({"a": TensorPlan((4,), {0: np.array([0, 2])})})
    with pytest.raises(ValueError, match=r"later: tensor 'a': .*\(4,\), expected \(2,\)"):
        plan.then(plan)


def test_what_is_no_tensor_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' -> list, expected str -> TensorPlan"):
        Plan({"a": [0, 1]})  # type: ignore[dict-item]


def graph() -> Any:
    """Two groups, as ``trace`` describes them: of 3 channels and of 2."""
    slots = {
        "one.weight": SimpleNamespace(
            shape=(3, 4), sizes=(), rescale=None, channels=(np.array([0, 1, 2]), None)
        ),
        "cat.weight": SimpleNamespace(
            shape=(2, 6), sizes=(), rescale=None, channels=(np.array([3, 4]), np.array([-1, 0, 1, 2, 3, 4]))
        ),
    }
    groups = (
        Group(0, "one", np.array([0, 1, 2]), (), (), ()),
        Group(1, "two", np.array([3, 4]), (), (), ()),
    )
    return SimpleNamespace(
        num_channels=5,
        tensors=slots,
        groups=groups,
        blocks=(),
        without_inner=lambda kept: kept,
        emptied_groups=partial(emptied, (), groups),
        kept_blocks=partial(kept_blocks, ()),
    )


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_kept_channels_become_kept_indices(make: Any) -> None:
    plan = make_plan(graph(), make([True, False, True, False, True]))
    assert plan == Plan(
        {
            "one.weight": TensorPlan((3, 4), {0: np.array([0, 2])}),
            "cat.weight": TensorPlan((2, 6), {0: np.array([1]), 1: np.array([0, 1, 3, 5])}),
        }
    )


def test_keeping_everything_removes_nothing() -> None:
    assert make_plan(graph(), np.ones(5, dtype=bool)).removes_nothing


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (np.ones(4, dtype=bool), r"kept: got bool \[4\], expected bool \[5\]"),
        (np.ones((5, 1), dtype=bool), r"kept: got bool \[5, 1\]"),
        (np.ones(5), r"kept: got float64 \[5\]"),
        (np.arange(5), r"kept: got int64 \[5\]"),
        (np.array([True, True, True, False, False]), "got no channel of two"),
    ],
)
def test_wrong_masks_are_refused(kept: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(graph(), kept)


def test_kept_is_what_the_hand_written_plan_keeps() -> None:
    assert chain_plan(Chain()).tensors["norm.bias"].new_shape == (len(KEPT),)


def test_what_is_left_of_a_plan_after_another() -> None:
    first = Plan({"a": TensorPlan((6, 4), {0: np.array([0, 2, 3, 5])})})
    of_a = TensorPlan((4, 4), {0: np.array([1, 3]), 1: np.array([0, 1])})
    second = Plan({"a": of_a, "b": TensorPlan((3,))})
    both = first.then(second)
    assert both.after(first).tensors["a"] == of_a
    assert first.after(first).removes_nothing
    assert both.after(Plan({})) == both
    with pytest.raises(ValueError, match="done: tensor 'a': done: got a part without indices of dimension 0"):
        first.after(both)
    with pytest.raises(ValueError, match="done: tensor 'a': done: got a part without indices"):
        Plan({}).after(first)


def test_the_text_of_a_plan_does_not_tell_in_how_many_cuts_it_was_made():
    keep = {1: np.array([0]), 0: np.array([0, 2])}
    plan = Plan({"b": TensorPlan((3, 2), keep), "a": TensorPlan((3,), {0: np.array([1])})})
    turned = Plan(dict(reversed(plan.tensors.items())))
    assert list(turned.tensors) != list(plan.tensors)
    assert turned.to_json() == plan.to_json()
