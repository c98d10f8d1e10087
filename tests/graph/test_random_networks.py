"""Random networks of many structures are exact and have exact costs."""

from __future__ import annotations

import pytest
from graph.random_check import examine
from graph.random_networks import STEPS, Plan, random_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FINE = ("exact", "whole", "refused")


def steps(dims: int) -> st.SearchStrategy[tuple[tuple[str, int], ...]]:
    names = [name for name, entry in STEPS.items() if dims in entry.dims]
    one = st.tuples(st.sampled_from(names), st.integers(0, 9999))
    return st.lists(one, min_size=1, max_size=3).map(tuple)


def plans() -> st.SearchStrategy[Plan]:
    of_dims = [st.builds(Plan, steps(dims), st.integers(0, 9999), st.just(dims)) for dims in (2, 3)]
    return st.one_of(*of_dims)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(plans())
def test_is_exact_or_whole(plan: Plan) -> None:
    outcome, said, _ = examine(plan)
    assert outcome in FINE, said


# Seeds of ``benchmarks.fuzz`` that once showed a fault.
SEEDS: tuple[int, ...] = (33,)


@pytest.mark.parametrize("seed", SEEDS)
def test_past_failures(seed: int) -> None:
    outcome, said, _ = examine(random_plan(seed))
    assert outcome in FINE, said
