"""The cases of ``sparsekern bench`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparsekern.bench.cases import CASES, Case
from sparsekern.bench.check import forced
from sparsekern.bench.comparison import Contest
from sparsekern.bench.comparisons import build, sides
from sparsekern.bench.environment import environment, kept_memory
from sparsekern.kernels import backends

HERE = [case for case in CASES if backends.why_not(case.backend, case.device) is None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with kept_memory():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def contest(request: pytest.FixtureRequest) -> Iterator[Contest]:
    case: Case = request.param
    with forced(case.backend):
        yield build(case)


@pytest.mark.parametrize(
    ("contest", "side"),
    [pytest.param(case, side, id=f"{case}-{side}") for case in HERE for side in sides(case)],
    indirect=["contest"],
)
def test_bench(
    benchmark: BenchmarkFixture, contest: Contest, side: str, request: pytest.FixtureRequest
) -> None:
    assert contest.wrong() is None
    benchmark.group = request.node.callspec.id.rpartition("-")[0]
    benchmark.extra_info |= environment() | {"elements": contest.elements, "bytes": contest.moved.get(side)}
    benchmark(contest.sides[side])
