"""The prediction of a step's speed, on listings and figures that are worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.gpu_model import listing, machines
from benchmarks.gpu_model.kernels import Kernel, Operation, _float64_before, kernel_of
from benchmarks.gpu_model.predict import Tensor, predict

# Two packs ahead of weight and gradient. The second pack is read under a condition, the gradient once more
# element by element, and a call is the slow path of a division. The first use of a load is at 00c0.
CODE = """
        /*0000*/                   DADD R60, R60, 1 ;                       /* 0x0 */
        /*0010*/                   CALL.REL.NOINC 0x0200 ;
        /*0020*/                   LDG.E.128 R4, desc[UR8][R40.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR8][R42.64] ;
        /*0040*/               @P0 LDG.E R8, desc[UR8][R44.64] ;
        /*0050*/               @P1 BRA 0x0090 ;
        /*0060*/                   LDG.E.128 R12, desc[UR8][R46.64] ;
        /*0070*/                   LDG.E.128 R16, desc[UR8][R48.64] ;
        /*0080*/                   IADD3 R50, R50, 0x4, RZ ;
        /*0090*/               @P2 BRA 0x00c0 ;
        /*00a0*/                   CALL.REL.NOINC 0x0300 ;
        /*00b0*/                   FMUL R20, R21, R22 ;
        /*00c0*/                   FADD R4, R4, R8 ;
        /*00d0*/               @P3 BRA 0x00f0 ;
        /*00e0*/                   STG.E.128 desc[UR8][R42.64], R8 ;
        /*00f0*/                   MUFU.RCP R5, R12 ;
        /*0100*/                   STG.E.128 desc[UR8][R40.64], R4 ;
        /*0110*/               @P1 BRA 0x0130 ;
        /*0118*/                   FMUL R12, R12, R5 ;
        /*0120*/                   STG.E.128 desc[UR8][R46.64], R12 ;
        /*0130*/              @!P4 BRA 0x0020 ;
        /*0140*/                   EXIT ;
        /*0200*/                   DMUL R60, R60, R60 ;
        /*0210*/                   DFMA R60, R60, R62, R64 ;
        /*0220*/                   RET.REL.NODEC R2 0x0 ;
        /*0300*/                   FMUL R1, R1, R1 ;
""".splitlines()
OP = Operation("example", reads=2, writes=1)


def test_registers_of_wide_loads_and_branches() -> None:
    code = listing.read(CODE)
    assert len(code) == 26
    assert code[2].is_wide and code[2].registers == {4, 5, 6, 7, 40}
    assert code[4].width == 4 and code[4].predicate == "P0"
    assert code[5].target == 0x90 and not code[5].always_leaves and code[21].always_leaves


def test_the_way_through_a_loop_has_all_loads_and_the_wanted_stores() -> None:
    loop = listing.main_loop(listing.read(CODE))
    assert loop is not None and loop.wide_loads == 4
    way = [one.at for one in listing.path(loop, 2, 1)]
    # Without the call, and without the store of the gradient at 00e0: the way over 0118 is longer.
    assert way == [*range(0x20, 0xA0, 0x10), 0xC0, 0xD0, 0xF0, 0x100, 0x110, 0x118, 0x120, 0x130]
    assert 0xE0 in [one.at for one in listing.path(loop, 4, 3)]
    with pytest.raises(ValueError, match="no way with 5 wide stores for 4 loads"):
        listing.path(loop, 4, 5)


def test_loads_count_as_in_flight_until_one_is_used() -> None:
    code = listing.read(CODE)
    loop = listing.main_loop(code)
    assert loop is not None
    assert listing.bytes_in_flight(listing.path(loop, 2, 1)) == 4 * 16
    # A use of the first load before the third one is requested.
    early = listing.read([*CODE[:5], "/*0038*/ FADD R4, R4, R4 ;", *CODE[5:]])
    assert listing.bytes_in_flight(listing.path(listing.main_loop(early) or loop, 2, 1)) == 2 * 16


def test_figures_of_a_kernel() -> None:
    code = listing.read(CODE)
    kernel = kernel_of(code, registers=70, shared=1000, op=OP)
    assert (kernel.packs, kernel.in_flight, kernel.total) == (2, 64, 16)
    assert kernel.instructions == {"other": 12, "integer": 1, "float32": 2, "special": 1}
    loop = listing.main_loop(code)
    assert loop is not None and _float64_before(code, loop) == 3


MACHINE = machines.Machine("example", "sm_0", 10, 1e12, 1e9, 128, 64, 100 << 10, 400, 32 << 10)
KERNEL = Kernel(
    registers=70, shared=1000, packs=2, in_flight=64, instructions={"float32": 40}, float64_before=0
)


def test_blocks_by_registers_shared_memory_and_threads() -> None:
    # 70 registers * 32 threads are 2240, rounded up to 2304 for a warp and 18432 for a block: 3 fit into
    # 65536.
    assert KERNEL.blocks_on(MACHINE) == 3
    assert KERNEL.in_flight_on(MACHINE) == 3 * 256 * 64
    # 50 KB and the 1 KB of CUDA: one block in 100 KB.
    assert dataclasses.replace(KERNEL, shared=50 << 10).blocks_on(MACHINE) == 1
    assert dataclasses.replace(KERNEL, registers=16).blocks_on(MACHINE) == 8


def test_latencies_follow_from_littles_law() -> None:
    # 100 bytes per clock and multiprocessor: 32 KB take 327.68 clocks, less than twice the latency without
    # load.
    assert MACHINE.latencies == (800, 800)
    assert dataclasses.replace(MACHINE, saturating=128 << 10).latencies == (800, pytest.approx(1310.72))


def test_a_list_that_waits_for_memory() -> None:
    """One tensor of 30 blocks with one row of 4096 elements each, all of which run at once."""
    tensor = Tensor(1, 30, 4096, 1, 1, 4096, 256, 30)
    found = predict([tensor], KERNEL, OP, 4, MACHINE, latency=1000)
    # Arguments: two reads of 100 clocks. The row: its factors, and 4096 / (256 * 4 * 2) = 2 iterations of
    # 1000 clocks and 40 instructions at 2 clocks; five exchanges and two barriers.
    block = 200 + 1000 + 2 * (1000 + 80) + 5 * 30 + 2 * 50
    assert found.latency == pytest.approx(block * 1e-9)
    assert found.memory == pytest.approx(30 * 4096 * 4 * 3 / (0.92 * 1e12))
    # Two iterations of 8 warps in 3 blocks a multiprocessor: 40 float32 instructions at 4 a clock.
    assert found.issue == pytest.approx(3 * 2 * 8 * 10 * 1e-9)
    # 30 rows are one pass of four reads behind the first one, with nine barriers.
    assert found.finish == pytest.approx((5 * 1000 + 9 * 50) * 1e-9)
    assert found.bound == "latency" and found.launches == 4e-6
    assert found.share == pytest.approx(found.memory / (found.latency + found.finish + 4e-6))


def test_twice_the_list_takes_two_turns_and_a_slow_pipe_bounds_it() -> None:
    tensor = Tensor(1, 60, 4096, 1, 1, 4096, 256, 60)
    found = predict([tensor], KERNEL, OP, 4, MACHINE, latency=1000)
    assert found.latency == pytest.approx(2 * 3610e-9)
    slow = dataclasses.replace(KERNEL, instructions={"special": 40})
    # 16 results a clock: two clocks for each of 40 instructions, 6 blocks, 2 iterations, 8 warps.
    assert predict([tensor], slow, OP, 4, MACHINE, latency=1000).issue == pytest.approx(6 * 2 * 8 * 80e-9)


def test_single_elements_and_columns() -> None:
    # Rows of 9 elements with 16 lanes: 4 groups of 16 rows; two whole packs for 16 lanes, then single
    # elements.
    rows = Tensor(1, 64, 9, 1, 64, 9, 16, 1)
    found = predict([rows], KERNEL, OP, 4, MACHINE, latency=1000)
    group = 1000 + (1000 + 80) + (1000 + 80 / 8) + 4 * 30
    assert found.latency == pytest.approx((200 + 4 * group) * 1e-9)
    # A tile of 32 packs over 64 outer indices: 8 at once, one pack ahead.
    columns = Tensor(64, 8, 16, 64, 8, 16, 0, 1)
    found = predict([columns], KERNEL, OP, 4, MACHINE, latency=1000)
    assert found.latency == pytest.approx((200 + 1000 + 8 * (1000 + 40) + 5 * 30 + 2 * 50) * 1e-9)
