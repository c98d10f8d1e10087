"""The kernels of a step as the prediction needs them, read off the machine code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_model import listing
from benchmarks.gpu_model.machines import Machine
from benchmarks.sass import readable, run, tools_path

THREADS = 256
"""Threads of a block of the first launch (`kThreads` in csrc/cuda/table.cuh)."""

_REGISTER_UNIT = 256
_SHARED_PER_BLOCK = 1024
"""Bytes of shared memory that CUDA takes for each block, from sm_80 on."""


@dataclass(frozen=True)
class Operation:
    """What an op moves for each element.

    Attributes:
        title: its name in the table.
        reads: lists of tensors that are read.
        writes: lists of tensors that are written.
    """

    title: str
    reads: int
    writes: int


OPERATIONS = {
    "Adam(W)": Operation("AdamW", 4, 3),
    "SGD momentum": Operation("SGD, momentum", 3, 2),
    "SGD": Operation("SGD", 2, 1),
    "statistics": Operation("statistics", 2, 0),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture.

    Attributes:
        registers: per thread.
        shared: bytes of static shared memory per block.
        packs: packs of each list that one iteration of the main loop loads.
        in_flight: bytes that a thread requests before it waits.
        instructions: of one iteration, by kind.
        float64_before: float64 instructions before the first pack, with those of the largest function called
            there.
    """

    registers: int
    shared: int
    packs: int
    in_flight: int
    instructions: Mapping[str, int]
    float64_before: int

    @property
    def total(self) -> int:
        """Instructions of one iteration of the main loop."""
        return sum(self.instructions.values())

    def blocks_on(self, machine: Machine) -> int:
        """Blocks that a multiprocessor holds at once, by registers, shared memory, threads and the limit."""
        warps = THREADS // 32
        of_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        return min(
            machine.registers // (of_warp * warps),
            machine.shared // (self.shared + _SHARED_PER_BLOCK),
            machine.threads // THREADS,
            machine.blocks,
        )

    def in_flight_on(self, machine: Machine) -> int:
        """Bytes of loads in flight on a multiprocessor."""
        return self.blocks_on(machine) * THREADS * self.in_flight


def kernel_of(code: Sequence[listing.Instruction], registers: int, shared: int, op: Operation) -> Kernel:
    """The figures of a kernel.

    Raises:
        ValueError: the code has no loop over packs.
    """
    loop = listing.main_loop(code)
    if loop is None:
        raise ValueError("code: got no loop with accesses of 16 bytes, expected one")
    way = listing.path(loop, op.reads, op.writes)
    packs = listing.Loop(tuple(way)).wide_loads // op.reads
    return Kernel(
        registers,
        shared,
        packs,
        listing.bytes_in_flight(way),
        listing.counts(way),
        _float64_before(code, loop),
    )


def _float64_before(code: Sequence[listing.Instruction], loop: listing.Loop) -> int:
    begin = loop.body[0].at
    before = [one for one in code if one.at < begin]
    own = sum(listing.kind(one) == "float64" for one in before)
    called = sorted({one.target for one in before if one.name == "CALL" and one.target is not None})
    largest = 0
    for target, end in zip(called, [*called[1:], code[-1].at + 1], strict=True):
        body = [one for one in code if target <= one.at < end]
        largest = max(largest, sum(listing.kind(one) == "float64" for one in body))
    return own + largest


def read(files: Sequence[Path]) -> dict[tuple[str, str, str], Kernel]:
    """The kernels for lists of many tensors in libraries or objects, by operation, dtype and architecture."""
    found: dict[tuple[str, str, str], Kernel] = {}
    path = tools_path()
    for file in files:
        sizes = _resources(run(path, "-res-usage", str(file)))
        for architecture, symbol, lines in _functions(run(path, "-sass", str(file))):
            name, dtype = _named(symbol)
            if name in OPERATIONS and (symbol, architecture) in sizes:
                registers, shared = sizes[symbol, architecture]
                kernel = kernel_of(listing.read(lines), registers, shared, OPERATIONS[name])
                found[name, dtype, architecture] = kernel
    return found


def _named(symbol: str) -> tuple[str, str]:
    """Operation and dtype of a kernel. Those for short lists have names of their own and the same code."""
    name, _, dtype = readable(symbol).rpartition(" ")
    return (name, dtype) if "4step" in symbol else ("", "")


def _resources(lines: Sequence[str]) -> dict[tuple[str, str], tuple[int, int]]:
    found, architecture, symbol = {}, "", ""
    for line in lines:
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:\d+ SHARED:(\d+)", line):
            found[symbol, architecture] = int(match[1]), int(match[2])
    return found


def _functions(lines: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Architecture, symbol and lines of each function of a listing."""
    architecture, symbol, body = "", "", []
    for line in lines:
        new = re.match(r"\s*Function : (\S+)", line)
        if symbol and (new or line.startswith("Fatbin")):
            yield architecture, symbol, body
            symbol, body = "", []
        if match := re.match(r"\s*code for (sm_\d+)", line):
            architecture = match[1]
        elif new:
            symbol = new[1]
        elif symbol:
            body.append(line)
    if symbol:
        yield architecture, symbol, body
