"""The cases of ``sparsekern bench`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparsekern.bench.cases import CASES, Case
from sparsekern.bench.check import forced
from sparsekern.bench.comparison import Comparison
from sparsekern.bench.comparisons import build, candidates
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
def comparison(request: pytest.FixtureRequest) -> Iterator[Comparison]:
    case: Case = request.param
    with forced(case.backend):
        yield build(case)


@pytest.mark.parametrize(
    ("comparison", "candidate"),
    [
        pytest.param(case, candidate, id=f"{case}-{candidate}")
        for case in HERE
        for candidate in candidates(case)
    ],
    indirect=["comparison"],
)
def test_bench(
    benchmark: BenchmarkFixture, comparison: Comparison, candidate: str, request: pytest.FixtureRequest
) -> None:
    assert comparison.validate() is None
    benchmark.group = request.node.callspec.id.rpartition("-")[0]
    benchmark.extra_info |= environment() | {
        "elements": comparison.elements,
        "bytes": comparison.moved.get(candidate),
    }
    benchmark(comparison.candidates[candidate])
