"""The time of a step on a list of tensors, from the figures of its kernel and of a GPU.

The first launch takes the longest of three times:

* memory: all bytes, at the rate of a plain stream;
* issue: all instructions of all warps, at the rate of the pipe that takes longest;
* latency: the times of all blocks, divided among those that run at once, or that of the longest block. A
  block reads its arguments (a binary search, each read waits for the one before), then the step counter, and
  computes Adam's bias corrections. For each group of rows it reads the factors of the rows, and then in each
  iteration a warp waits for the memory once and issues its instructions. This is Little's law: what a
  multiprocessor has in flight in each latency.

The second launch has one block for each tensor: four dependent reads for each 512 rows, and nine barriers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu_model import machines
from benchmarks.gpu_model.kernels import THREADS, Kernel, Operation
from benchmarks.gpu_model.machines import WARP, Machine

_FINISH_THREADS = 512


@dataclass(frozen=True)
class Tensor:
    """A tensor and its division into chunks, as csrc/cuda/cut.cpp makes it.

    Attributes:
        outer, rows, inner: its shape in memory.
        row_step, inner_step, outer_step: of a chunk.
        lanes: threads that share a row; 0 if ``outer`` is more than 1.
        chunks: their number.
    """

    outer: int
    rows: int
    inner: int
    outer_step: int
    row_step: int
    inner_step: int
    lanes: int
    chunks: int

    @property
    def elements(self) -> int:
        return self.outer * self.rows * self.inner


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and of its parts."""

    memory: float
    issue: float
    latency: float
    finish: float
    launches: float

    @property
    def total(self) -> float:
        return max(self.memory, self.issue, self.latency) + self.finish + self.launches

    @property
    def share(self) -> float:
        """Of the rate of the plain stream."""
        return self.memory / self.total

    @property
    def bound(self) -> str:
        return max(("memory", "issue", "latency"), key=lambda name: float(getattr(self, name)))


def _iterations(tensor: Tensor, pack: int, packs: int) -> tuple[int, int, int]:
    """Of a block: groups of rows, iterations of the main loop in each, and iterations of single elements."""
    if tensor.lanes == 0:
        # A thread has one column of the tile and goes through outer indices, a pack at a time.
        columns = min(THREADS, max(1, tensor.row_step * tensor.inner_step // pack))
        return 1, math.ceil(tensor.outer_step / (THREADS // columns)), 0
    groups = math.ceil(min(tensor.rows, tensor.row_step) / (THREADS // tensor.lanes))
    whole = tensor.inner_step // pack if tensor.inner_step >= pack else 0
    singles = 0 if tensor.inner_step % pack == 0 else 1
    return groups, math.ceil(whole / (tensor.lanes * packs)), singles


def _block_clocks(
    tensor: Tensor, kernel: Kernel, pack: int, latency: float, tensors: int, adam: bool
) -> float:
    """Clocks of one block, if nothing but its own waits holds it up."""
    packs = 1 if tensor.lanes == 0 else kernel.packs
    groups, iterations, singles = _iterations(tensor, pack, packs)
    issue = machines.CLOCKS_PER_INSTRUCTION * kernel.total
    arguments = (1 + math.ceil(math.log2(max(2, tensors)))) * machines.CONSTANT_CLOCKS
    corrections = latency + machines.FLOAT64_CLOCKS * kernel.float64_before if adam else 0.0
    of_group = latency
    of_group += iterations * (latency + issue * packs / kernel.packs)
    of_group += singles * (latency + issue / (kernel.packs * pack))
    if tensor.lanes != 1:
        of_group += math.log2(tensor.lanes if 0 < tensor.lanes < WARP else WARP) * machines.SHUFFLE_CLOCKS
    if not 0 < tensor.lanes <= WARP:
        of_group += 2 * machines.BARRIER_CLOCKS
    return arguments + corrections + groups * of_group


def _issue_clocks(tensor: Tensor, kernel: Kernel, pack: int, machine: Machine) -> float:
    """Clocks of a multiprocessor for one block, by the pipe that takes longest."""
    packs = 1 if tensor.lanes == 0 else kernel.packs
    groups, iterations, singles = _iterations(tensor, pack, packs)
    rounds = groups * (iterations * packs / kernel.packs + singles / (kernel.packs * pack))
    lanes = {
        "float32": machine.float32_lanes,
        "float64": machine.float64_lanes,
        **machines.OTHER_LANES,
    }
    of_pipe = [kernel.total / machines.SCHEDULERS]
    of_pipe += [n * WARP / lanes[kind] for kind, n in kernel.instructions.items() if kind in lanes]
    return rounds * (THREADS // WARP) * max(of_pipe)


def _finish_clocks(tensors: Sequence[Tensor], latency: float) -> float:
    passes = max(math.ceil(tensor.rows / _FINISH_THREADS) for tensor in tensors)
    return latency + 4 * passes * latency + 9 * machines.BARRIER_CLOCKS


def predict(
    tensors: Sequence[Tensor],
    kernel: Kernel,
    op: Operation,
    element_size: int,
    machine: Machine,
    latency: float,
) -> Prediction:
    """The time of one step.

    Args:
        tensors: the list; all of them are tracked.
        kernel: the kernel of the first launch.
        op: what it moves.
        element_size: bytes of an element.
        machine: the GPU.
        latency: of its memory under load, in clocks.
    """
    pack = 16 // element_size
    adam = op.reads > 3
    moved = sum(tensor.elements for tensor in tensors) * element_size * (op.reads + op.writes)
    clocks = [_block_clocks(tensor, kernel, pack, latency, len(tensors), adam) for tensor in tensors]
    slots = machine.multiprocessors * kernel.blocks_on(machine)
    waits = sum(tensor.chunks * one for tensor, one in zip(tensors, clocks, strict=True)) / slots
    issue = sum(tensor.chunks * _issue_clocks(tensor, kernel, pack, machine) for tensor in tensors)
    return Prediction(
        memory=moved / (machines.STREAM * machine.bandwidth),
        issue=issue / machine.multiprocessors / machine.clock,
        latency=max(waits, *clocks) / machine.clock,
        finish=_finish_clocks(tensors, latency) / machine.clock,
        launches=2 * machines.LAUNCH_SECONDS,
    )
