"""The emulation detects the faults that it must detect; otherwise passing kernels would prove nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

NONE, MISSING_BARRIER, HALF_OF_THE_BLOCK, HALF_OF_A_WARP, NOT_ALIGNED, *READS_SHARED_FIRST, OVERWRITES = (
    range(8)
)
LAUNCH_FAILURE = 719
SUM = 64 * 65 / 2


@pytest.fixture
def library(emulated_library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    emulated_library.emulation_order(0, False)
    yield emulated_library
    emulated_library.emulation_order(0, False)
    emulated_library.emulation_forgive()


def _run(library: ctypes.CDLL, fault: int) -> tuple[int, list[float]]:
    # On a boundary of 16 bytes.
    memory = (ctypes.c_float * 68)()
    start = -ctypes.addressof(memory) % 16
    out = (ctypes.c_float * 64).from_buffer(memory, start)
    return library.emulation_fault(fault, out), list(out)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_sound_kernel(library: ctypes.CDLL, order: int) -> None:
    library.emulation_order(order, False)
    code, out = _run(library, NONE)
    assert code == 0 and out[0] == SUM


def test_a_missing_barrier_shows_as_another_result_in_another_order(library: ctypes.CDLL) -> None:
    results = set()
    for order in (0, 1):
        library.emulation_order(order, False)
        code, out = _run(library, MISSING_BARRIER)
        assert code == 0
        results.add(out[0])
    assert len(results) == 2


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (HALF_OF_THE_BLOCK, "threads wait for others that do not come"),
        (HALF_OF_A_WARP, "threads wait for others that do not come"),
        (NOT_ALIGNED, "an access is not aligned as promised"),
    ],
)
def test_a_fault_fails_the_launch_and_all_later_ones(library: ctypes.CDLL, fault: int, text: str) -> None:
    assert _run(library, fault)[0] == LAUNCH_FAILURE
    assert library.sparsekern_cuda_error(LAUNCH_FAILURE).decode() == text
    assert _run(library, NONE)[0] == LAUNCH_FAILURE
    library.emulation_forgive()
    code, out = _run(library, NONE)
    assert code == 0 and out[0] == SUM


@pytest.mark.parametrize("fault", READS_SHARED_FIRST)
@pytest.mark.parametrize("launch", [0, 1])
def test_shared_memory_holds_nan_at_first(library: ctypes.CDLL, fault: int, launch: int) -> None:
    for _ in range(1 + launch):
        code, out = _run(library, fault)
    assert code == 0 and all(value != value for value in out)


def test_a_warp_that_runs_ahead_shows_what_it_overwrites(library: ctypes.CDLL) -> None:
    found = []
    for order, starve in ((0, False), (1, False), (1, True)):
        library.emulation_order(order, starve)
        code, out = _run(library, OVERWRITES)
        assert code == 0
        found.append(out[0])
    assert found == [24, 24, 34]
