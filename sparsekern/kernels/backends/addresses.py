"""Where the tensors of a list lie at a call, for kernels that are given addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsekern.kernels import memory as _memory
from sparsekern.kernels import native
from sparsekern.kernels.backends.lists import STEPS, Lists, named, read_lists
from sparsekern.kernels.native import cuda_library, pointers

SLOTS = STEPS + 1
"""Lists of a call, as in csrc/abi.h."""


class Addresses:
    """What the tensors of a list have to be, and where they are at a call."""

    def __init__(self, params: Sequence[Tensor], rows: int, dlpack_type: int) -> None:
        """
        Args:
            params: the first list; the others are like it.
            rows: how many the arrays of the table need to have.
            dlpack_type: what DLPack calls the device.
        """
        self.dtype, self.device, self.rows = params[0].dtype, params[0].device, rows
        self.layouts = [pointers.layout(param) for param in params]
        module = native.load()
        self._expected: Any = None
        if module is not None:
            kind = cuda_library.DTYPES[self.dtype], self.layouts, rows, dlpack_type, self.device.index or 0
            self._expected = module.layout(*kind)

    def read(self, op: int, lists: Lists, arrays: tuple[Tensor, ...], scaled: bool) -> bytes | None:
        """``[6][tensors]`` addresses and eight of the flat arrays.

        Args:
            op: one of those of csrc/abi.h.
            scaled: whether gradients are written to.

        Returns:
            None when a tensor does not fit, or shares memory with one that is written to.
        """
        if native.exchanges:
            found: bytes | None = _C.addresses(self._expected, lists, arrays, op, scaled)
            return found
        of_lists = pointers.of_lists(lists, self.layouts, self.dtype, STEPS, self.device)
        of_arrays = pointers.of_arrays(arrays, self.device)
        if of_lists is None or of_arrays is None or not self._has_rows([size for _, size in of_arrays]):
            return None
        if not _disjoint(op, lists, arrays, scaled):
            return None
        padded = [addresses or [0] * len(self.layouts) for addresses in of_lists]
        padded += [[0] * len(self.layouts)] * (SLOTS - len(of_lists))
        flat = [address for addresses in padded for address in addresses]
        flat += [address for address, _ in of_arrays] or [0] * cuda_library.ROW_ARRAYS
        return bytes((ctypes.c_uint64 * len(flat))(*flat))

    def _has_rows(self, sizes: list[int]) -> bool:
        """Whether flat arrays of so many elements are those of one table."""
        if not sizes:
            return True
        rows = sizes[0]
        return rows >= self.rows and sizes == [rows, rows, rows, 4 * rows, rows, rows, 1, 1]


def _disjoint(op: int, lists: Lists, arrays: tuple[Tensor, ...], scaled: bool) -> bool:
    every = named(op, lists)
    read = {name: every[name] for name in read_lists(op, scaled)} | {"rows": arrays[:2]}
    written = {name: tensors for name, tensors in every.items() if name not in read} | {"table": arrays[2:]}
    try:
        _memory.check_disjoint(written, read)
    except ValueError:
        return False
    return True


_C: Any = native.load()
