"""Functions in processes of their own."""

from __future__ import annotations

import os

import pytest

from benchmarks.limited import limited


def double(x: int) -> int:
    return 2 * x


def endless() -> None:
    while True:
        pass


def test_the_result_comes_back():
    assert limited(double, 21, seconds=60) == 42


def test_a_function_that_computes_for_too_long_is_ended():
    with pytest.raises(TimeoutError, match="no result in 1 s of processor time"):
        limited(endless, seconds=1)


def test_a_process_that_ends_by_itself_is_told_apart():
    with pytest.raises(RuntimeError, match="exit code 3"):
        limited(os._exit, 3, seconds=60)
