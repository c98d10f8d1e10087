"""Recording the calls of native code: inputs, and memory after the call, as replay.cpp reads them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from sparsekern.kernels import native
from sparsekern.kernels.backends.cpu import norm_act as cpu_norm
from sparsekern.kernels.backends.cpu import step as cpu_step
from sparsekern.kernels.native import pointers
from sparsekern.kernels.options import STEPS

END = struct.pack("<q", 0)
_STEP, _FORWARD, _BACKWARD, _CHANNELS = range(1, 5)

_MISFIT = -1
_ELEMENT_SIZES = (4, 8, 2, 2, 1)
_FLOAT32, _FLOAT64, _BFLOAT16, _FLOAT16, _WHOLE = range(5)
_DATA, _VECTOR = "data", "vector"

# Element types of the tensors of a normalisation, in the order of csrc/norm_module.cpp.
_INPUTS = (_DATA, _DATA, _VECTOR, _VECTOR, _WHOLE)
_OF_FORWARD = (_VECTOR, _VECTOR, _DATA, _VECTOR, _VECTOR)
_OF_BACKWARD = (_DATA, _VECTOR, _VECTOR, _DATA, _DATA, _VECTOR, _VECTOR, _FLOAT32, _FLOAT32, _FLOAT32)


@dataclass
class _Memory:
    """One tensor of a call: element type of replay.cpp, address and bytes before and after the call."""

    type: int
    address: int
    before: bytes
    after: bytes = b""

    def packed(self) -> bytes:
        head = struct.pack("<3q", self.type, len(self.before), self.address % 64)
        return head + self.before + self.after


class _Memories:
    """The tensors of a call. ``place`` gives the number of a tensor, -1 for none."""

    def __init__(self) -> None:
        self._all: list[_Memory] = []
        self._numbers: dict[int, int] = {}

    def place(self, kind: int, address: int, size: int) -> int:
        if address == 0:
            return -1
        if address not in self._numbers:
            self._numbers[address] = len(self._all)
            self._all.append(_Memory(kind, address, ctypes.string_at(address, size)))
        return self._numbers[address]

    def packed(self, *, spoiled: bool) -> bytes:
        """All tensors, with their memory as it is now; spoiled: one bit of it is another."""
        for memory in self._all:
            memory.after = ctypes.string_at(memory.address, len(memory.before))
        if spoiled:
            first = self._all[0].after
            self._all[0].after = bytes([first[0] ^ 1]) + first[1:]
        return struct.pack("<q", len(self._all)) + b"".join(memory.packed() for memory in self._all)


@dataclass
class _Plan:
    native: Any
    dtype: int
    layouts: list[pointers.Layout]
    shapes: list[tuple[int, int, int, int]]


class Recorder:
    """Stands in for the native module: makes its calls, and writes each that succeeds.

    Args:
        write: gets the bytes of each call.

    Attributes:
        name: name of the calls that follow.
        spoils: whether the memory after a call is written with one bit changed, which has to be noticed.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._real = native.load()
        self.name = ""
        self.spoils = False

    def plan(self, dtype: int, layouts: list[pointers.Layout], shapes: list[Any]) -> _Plan:
        return _Plan(self._real.plan(dtype, layouts, shapes), dtype, layouts, shapes)

    def step_at(
        self,
        plan: _Plan,
        op: int,
        lists: list[list[int]],
        arrays: list[pointers.Place],
        values: tuple[float, ...],
        update_statistics: bool,
        threads: int,
    ) -> int:
        memories = _Memories()
        count = len(plan.shapes)
        numbers = [op, plan.dtype, update_statistics, count, *(n for shape in plan.shapes for n in shape)]
        sizes = [_elements(sizes) * _ELEMENT_SIZES[plan.dtype] for sizes, _ in plan.layouts]
        for slot in range(STEPS + 1):
            given = lists[slot] if slot < len(lists) and lists[slot] else [0] * count
            for address, size in zip(given, sizes, strict=True):
                steps = slot == STEPS
                numbers.append(
                    memories.place(_FLOAT32 if steps else plan.dtype, address, 4 if steps else size)
                )
        for i, dtype in enumerate(pointers.ARRAY_DTYPES):
            address, elements = arrays[i] if arrays else (0, 0)
            kind = _FLOAT32 if dtype.is_floating_point else _WHOLE
            numbers.append(memories.place(kind, address, elements * dtype.itemsize))
        code: int = self._real.step_at(plan.native, op, lists, arrays, values, update_statistics, threads)
        if code == 0:
            self._call(_STEP, memories, _integers(numbers) + _reals(values))
        return code

    def norm_forward(self, *arguments: Any) -> int:
        """Refuses the tensors, so that the caller passes addresses."""
        return _MISFIT

    norm_backward = norm_forward

    def norm_forward_at(self, *arguments: Any) -> int:
        momentum = arguments[-2]
        return self._norm(_FORWARD, self._real.norm_forward_at, arguments, _OF_FORWARD, (momentum,))

    def norm_backward_at(self, *arguments: Any) -> int:
        tau, decay = arguments[-3:-1]
        return self._norm(_BACKWARD, self._real.norm_backward_at, arguments, _OF_BACKWARD, (tau, decay))

    def _norm(
        self,
        kind: int,
        call: Callable[..., int],
        arguments: tuple[Any, ...],
        own_types: Sequence[int | str],
        reals: tuple[float, ...],
    ) -> int:
        dtype, shape, inputs, own, activation, training, eps = arguments[:7]
        memories = _Memories()
        types = {_DATA: dtype, _VECTOR: _FLOAT64 if dtype == _FLOAT64 else _FLOAT32}

        def placed(places: Sequence[pointers.Place], kinds: Sequence[int | str]) -> bytes:
            pairs = zip(places, kinds, strict=True)
            return _integers([memories.place(types.get(kind, kind), *place) for place, kind in pairs])

        head = _integers([dtype, *shape, activation, training]) + _reals([eps])
        head += placed(inputs, _INPUTS) + _reals(reals) + placed(own, own_types)
        code = call(*arguments)
        if code == 0:
            self._call(kind, memories, head)
        return code

    def step_channels(self, arrays: Sequence[torch.Tensor], decay: float) -> bool:
        memories = _Memories()
        numbers = []
        for array in arrays:
            kind = _FLOAT32 if array.is_floating_point() else _WHOLE
            # An array without elements may have no address, and its memory is not used.
            numbers.append(memories.place(kind, pointers.address_of(array), array.nbytes))
        done: bool = self._real.step_channels(arrays, decay)
        if done:
            sizes = [len(arrays[3]), len(arrays[1]), len(arrays[2])]
            self._call(_CHANNELS, memories, _integers(sizes) + _reals([decay]) + _integers(numbers))
        return done

    def _call(self, kind: int, memories: _Memories, arguments: bytes) -> None:
        name = self.name.encode()
        self._write(_integers([kind, len(name)]) + name + memories.packed(spoiled=self.spoils) + arguments)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """The CPU backend makes its calls through the recorder meanwhile, by addresses, with plans of its own."""
    with (
        patch.object(cpu_step, "_C", recorder),
        patch.object(cpu_norm, "_C", recorder),
        patch.object(cpu_step._steps, "plans", {}),
        patch.object(native, "exchanges", False),
    ):
        yield


def _integers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _reals(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def _elements(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
