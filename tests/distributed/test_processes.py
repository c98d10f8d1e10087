"""The helper that runs processes: nothing hangs, and failures are reported."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from benchmarks.processes import run


def _rank() -> int:
    return dist.get_rank()


def _rank_one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank one")
    dist.barrier()


def _never_ends() -> None:
    time.sleep(600)


def test_results_come_by_rank() -> None:
    assert run(_rank, 2) == [0, 1]


def test_a_failing_rank_ends_the_others_and_is_named() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)rank 1 failed.*of rank one"):
        run(_rank_one_fails, 2)
    assert time.monotonic() - began < 30


def test_the_time_limit_ends_all() -> None:
    with pytest.raises(AssertionError, match="time limit"):
        run(_never_ends, 2, timeout=3)
