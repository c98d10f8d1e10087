"""Bytes, times and spreads."""

from __future__ import annotations

import pytest
import torch
from bench.small import case, suite

from sparsekern.bench import timing
from sparsekern.bench.calls import ROW_BYTES
from sparsekern.bench.comparison import OURS
from sparsekern.bench.comparisons import build
from sparsekern.bench.problem import Problem
from sparsekern.bench.stream import Stream
from sparsekern.bench.suite import TIMED
from sparsekern.bench.timing import Spread, interleaved
from sparsekern.optim import AdamW


def test_bytes_of_a_step(small: str) -> None:
    plain = build(case("adam_step_", tensors="few", masked=None))
    assert plain.elements == 20
    assert plain.moved == dict.fromkeys((OURS, "torch fused", "torch foreach"), 20 * 7 * 4)
    halves = build(case("sgd_step_", tensors="few", masked=None, dtype=torch.bfloat16))
    assert halves.moved[OURS] == 20 * 5 * 2
    rows = build(case("adam_step_", tensors="few"))
    assert rows.moved[OURS] == 20 * (7 * 4 + ROW_BYTES)
    assert rows.moved["torch fused"] == 20 * 7 * 4


def test_masked_rows_need_not_be_moved(small: str) -> None:
    whole, half = (Problem.of(case("adam_step_", masked=share), AdamW) for share in (0.0, 0.5))
    assert whole.live_elements() == sum(p.numel() for p in whole.params)
    assert half.table is not None
    masked = sum(
        int((half.table.countdown[view.slice] == 0).sum()) * view.param.numel() // view.rows
        for view in half.table.views
    )
    assert 0 < masked == whole.live_elements() - half.live_elements()
    assert build(case("adam_step_", masked=0.5)).moved[OURS] < build(case("adam_step_")).moved[OURS]


def test_two_problems_of_a_case_are_equal_and_apart(small: str) -> None:
    one, other = (Problem.of(case("adam_step_", masked=0.5), AdamW) for _ in range(2))
    for (name, mine), theirs in zip(one.tensors().items(), other.tensors().values(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr()
    assert one.table is not None and bool((one.table.penalty > 0).any())
    assert bool((one.table.countdown > 0).any()) and bool((one.table.countdown == 0).any())


class Clock:
    """A clock that only the timed candidates advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def candidate(self, name: str, seconds: float) -> object:
        def run() -> None:
            self.now += seconds
            self.order.append(name)

        return run


def test_sides_take_turns_and_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    candidates = {"short": clock.candidate("short", 0.25), "long": clock.candidate("long", 2.0)}
    times = interleaved(candidates, 3, torch.device("cpu"), shortest=1.0)
    assert times == {"short": [0.25] * 3, "long": [2.0] * 3}
    assert clock.order[-15:] == [*["short"] * 4, "long", "long", *["short"] * 4, *["short"] * 4, "long"]


def test_spread() -> None:
    assert Spread.of([float(n) for n in range(11)]) == Spread(5.0, 2.5, 7.5, 1.0, 9.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


def test_figures_of_a_result_agree(small: str) -> None:
    result = suite(placements=3, rounds=2).result(case("adam_step_"))
    assert result.status == TIMED and result.share_of_stream is not None
    for name, seconds in result.seconds.items():
        assert result.gb_per_s[name] == pytest.approx(1e-9 * result.moved[name] / seconds.median)
    spread = result.over["torch fused"]
    assert spread.q1 <= spread.median <= spread.q3
    report = suite().run([case("adam_step_"), case("adamw-iteration")])
    assert [r.status for r in report.results] == [TIMED, TIMED]
    assert report.stream_gb_per_s["cpu"].median > 0 and report.environment["threads"] >= 1


def test_the_stream_writes_three_arrays_and_reads_four() -> None:
    stream = Stream(torch.device("cpu"), 100)
    arrays = (stream._w, stream._m, stream._v, stream._g)
    versions = [array._version for array in arrays]
    stream()
    assert [array._version - old for array, old in zip(arrays, versions, strict=True)] == [1, 1, 1, 0]
    assert stream._w.eq(2).all() and stream._g.eq(1).all()
