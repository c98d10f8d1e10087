"""Criteria and allocators by name, and the ``repr`` of a Pruner."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
import torch
from prune.networks import Plain, batch, train

import sparsekern
from sparsekern import Pruner, allocate, criteria, prune_once
from sparsekern.prune.decide.budget import Unit
from sparsekern.prune.decide.names import ALLOCATORS, CRITERIA, resolve_allocate, resolve_select


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("taylor", criteria.Taylor()),
        (" Gradient_Count ", criteria.GradientCount()),
        ("joint", criteria.default()),
        (None, criteria.default()),
        (criteria.Random(3), criteria.Random(3)),
        (
            "taylor*gradient-count + magnitude",
            criteria.Taylor() * criteria.GradientCount() + criteria.Magnitude(),
        ),
    ],
)
def test_names_mean_criteria(text: Any, expected: criteria.Criterion) -> None:
    assert repr(resolve_select(text)) == repr(expected)


def test_every_name_is_taken_by_both_doors() -> None:
    for name in CRITERIA:
        assert isinstance(resolve_select(name), criteria.Criterion)
    for name, kind in ALLOCATORS.items():
        assert resolve_allocate(name) == kind() == resolve_allocate(kind())
    assert resolve_allocate(None) == allocate.Global()
    by_name = prune_once(Plain().eval(), batch(0), keep=0.5, select="magnitude", allocate="uniform")
    assert by_name.plan.tensors
    model = Plain()
    pruner = Pruner(
        model,
        torch.optim.SGD(model.parameters()),
        batch(0),
        keep=0.5,
        steps=20,
        select="taylor",
        allocate="flat",
    )
    assert (
        pruner._settings.policy.select == criteria.Taylor()
        and pruner._settings.policy.allocate == allocate.Flat()
    )


@pytest.mark.parametrize(
    "bad", ["", "taylor*", "nowhere", "taylor-magnitude", 3, torch.ones(2), criteria.Taylor]
)
def test_other_criteria_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="^select: got .*joint, gradient-count, magnitude"):
        resolve_select(bad)


@pytest.mark.parametrize("bad", ["", "all", 3, allocate.Global])
def test_other_allocators_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="^allocate: got .*flat, global, uniform"):
        resolve_allocate(bad)


def test_a_pruner_says_where_it_stands() -> None:
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, optimizer, batch(0), keep=0.5, steps=20, events=2)
    assert repr(pruner) == (
        "Pruner(Plain, AdamW, keep=0.5, of='macs', step 0 of 20: 100.0% of macs left, not finished)"
    )
    train(model, optimizer, range(20))
    share = pruner.metrics()["macs_share"]
    assert repr(pruner).endswith(f"step 20 of 20: {share:.1%} of macs left, finished)")


def test_costs_are_typed_by_their_names() -> None:
    for function in (Pruner.__init__, prune_once):
        hints = get_type_hints(function)
        assert hints["of"] == Unit
