"""Recorded calls hold what the kernels read and write, and the tools around them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from kernels.replay.machine_code import arithmetic_of
from kernels.replay.record import Recorder, recording

from sparsekern.kernels.backends import cpu, reference
from sparsekern.kernels.selfcheck import cases, norms
from sparsekern.kernels.selfcheck.calls import OPS
from sparsekern.kernels.selfcheck.problems import problem

CPU = torch.device("cpu")


def _recorded(case: cases.Case, *, spoils: bool = False) -> list[bytes]:
    calls: list[bytes] = []
    recorder = Recorder(calls.append)
    recorder.name, recorder.spoils = case.name, spoils
    with recording(recorder):
        assert case.examine(cpu, CPU) is None
    return calls


def _buffers(call: bytes) -> list[tuple[int, int, bytes, bytes]]:
    """Element type, distance from a cache line, and memory before and after, of each tensor."""
    _, length = struct.unpack_from("<2q", call)
    at = 16 + length
    (count,) = struct.unpack_from("<q", call, at)
    at += 8
    found = []
    for _ in range(count):
        kind, size, offset = struct.unpack_from("<3q", call, at)
        at += 24
        found.append((kind, offset, call[at : at + size], call[at + size : at + 2 * size]))
        at += 2 * size
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_step_is_recorded_whole(dtype: torch.dtype) -> None:
    shapes = (((17, 9), 0), ((3, 40, 2, 2), 0))
    (call,) = _recorded(cases.step("adamw", dtype, "contiguous", shapes=shapes))
    buffers = _buffers(call)
    # Parameter, gradient, two states and a step for each tensor; then the arrays of the rows.
    assert len(buffers) == 5 * 2 + 8
    want = problem(dtype, "contiguous", "some masked, some fading", shapes=shapes)
    param = want.tensors["params"][0].view
    assert buffers[0][2] == param.detach().view(torch.uint8).numpy().tobytes()
    OPS["adamw"].call(reference, want)
    assert buffers[0][3] == param.detach().view(torch.uint8).numpy().tobytes() != buffers[0][2]
    assert {kind for kind, *_ in buffers} == {0, 4} | ({3} if dtype is torch.float16 else set())


def test_one_bit_is_spoilt_on_demand() -> None:
    case = cases.norm((3, 9, 5, 3), torch.float32, "contiguous_format", "relu")
    right, wrong = _recorded(case), _recorded(case, spoils=True)
    assert len(right) == len(wrong) == 2
    for ours, theirs in zip(map(_buffers, right), map(_buffers, wrong), strict=True):
        bits = int.from_bytes(ours[0][3], "little") ^ int.from_bytes(theirs[0][3], "little")
        assert bits.bit_count() == 1
        assert [b[3] for b in ours[1:]] == [b[3] for b in theirs[1:]]


def test_the_driver_reads_as_many_arguments_as_are_written() -> None:
    """The kinds of calls, in the driver and here."""
    text = (Path(__file__).parent / "replay" / "replay.cpp").read_text()
    assert "enum Kind : int64_t { kEnd, kStep, kForward, kBackward, kChannels };" in text
    kinds = []
    for case in (
        cases.step("mask", torch.float32, "contiguous"),
        cases.norm((3, 9, 5, 3), torch.bfloat16, "channels_last", "silu", residual=True),
        *cases.moments((7,)),
    ):
        kinds += [struct.unpack_from("<q", call)[0] for call in _recorded(case)]
    assert kinds == [1, 2, 3, *[4] * 4]


ARM64 = """
  10:\t1e612800 \tfadd\td0, d0, d1
  14:\t4e21d400 \tfadd\tv0.4s, v0.4s, v1.4s
  18:\t6e21fc00 \tfdiv\tv0.4s, v0.4s, v1.4s
  1c:\t4e21cc00 \tfmla\tv0.4s, v0.4s, v1.4s
  20:\t1f410800 \tfmadd\td0, d0, d1, d2
  24:\t91000400 \tadd\tx0, x0, #0x1
"""


def test_instructions_are_counted() -> None:
    code = arithmetic_of(ARM64)
    assert (code.vector, code.scalar, code.fused) == (3, 2, 2)


@pytest.mark.parametrize("layout", norms.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_of_the_long_list_on_the_cpu(layout: str, dtype: torch.dtype) -> None:
    """The cases that are recorded equal plain torch, strides of results included."""
    case = cases.norm((3, 9, 5, 3), dtype, layout, "hardswish", residual=True, masked=0.4)
    assert case.examine(cpu, CPU) is None
