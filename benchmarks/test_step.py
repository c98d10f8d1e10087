"""The cases of :mod:`benchmarks.step` under pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.step import CASES, Case, build


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", ["torch", "ours"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark: BenchmarkFixture, case: Case, side: str) -> None:
    pair = build(case)
    benchmark.group = str(case)
    benchmark.extra_info["elements"] = pair.elements
    benchmark(pair.ours.step if side == "ours" else pair.theirs.step)
