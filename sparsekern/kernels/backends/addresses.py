"""Addresses of the tensors of one call, and plans for kernels that take addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from sparsekern.kernels import memory as _memory
from sparsekern.kernels import native
from sparsekern.kernels.backends.lists import row_arrays
from sparsekern.kernels.backends.planned import Plan
from sparsekern.kernels.native import cuda_library, pointers
from sparsekern.kernels.options import STATISTICS, STEPS, Lists, Options, Scaling, named, read_lists
from sparsekern.kernels.rows import ROW_ARRAYS, Rows, Table

SLOTS = STEPS + 1
"""Number of lists of tensors in a call, as in csrc/abi.h."""


class Addresses:
    """The expected dtype, layouts and device of a list of tensors; reads their addresses at each call.

    Attributes:
        dtype: dtype of all tensors.
        device: device of all tensors.
        rows: number of rows that the arrays of the table have to hold.
        layouts: sizes and strides of each tensor.
    """

    def __init__(self, params: Sequence[Tensor], rows: int, dlpack_type: int) -> None:
        """Store what is expected of the tensors of later calls.

        Args:
            params: the parameters; the tensors of the other lists have the same layouts.
            rows: number of rows that the arrays of the table have to hold.
            dlpack_type: DLPack's number of the device type.
        """
        self.dtype, self.device, self.rows = params[0].dtype, params[0].device, rows
        self.layouts = [pointers.layout(param) for param in params]
        module = native.load()
        self._expected: Any = None
        if module is not None:
            kind = cuda_library.DTYPES[self.dtype], self.layouts, rows, dlpack_type, self.device.index or 0
            self._expected = module.layout(*kind)

    def read(self, op: int, lists: Lists, arrays: tuple[Tensor, ...], scaled: bool) -> bytes | None:
        """Addresses of all tensors of a call as packed 64-bit integers.

        Args:
            op: number of the op, as in csrc/abi.h.
            lists: the lists of tensors of the op.
            arrays: the eight flat arrays of the table, or none.
            scaled: whether the gradients are written, because they are divided by a scale.

        Returns:
            ``[6][tensors]`` addresses, then those of the eight flat arrays. None when a tensor does not
            match, or when it shares memory with a tensor that is written.
        """
        if native.exchanges:
            found: bytes | None = _C.addresses(self._expected, lists, arrays, op, scaled)
            return found
        list_addresses = pointers.addresses_of_lists(lists, self.layouts, self.dtype, STEPS, self.device)
        array_addresses = pointers.addresses_of_arrays(arrays, self.device)
        if list_addresses is None or array_addresses is None:
            return None
        if not self._has_rows([size for _, size in array_addresses]):
            return None
        if not _disjoint(op, lists, arrays, scaled):
            return None
        padded = [addresses or [0] * len(self.layouts) for addresses in list_addresses]
        padded += [[0] * len(self.layouts)] * (SLOTS - len(list_addresses))
        flat = [address for addresses in padded for address in addresses]
        flat += [address for address, _ in array_addresses] or [0] * len(ROW_ARRAYS)
        return bytes((ctypes.c_uint64 * len(flat))(*flat))

    def _has_rows(self, sizes: list[int]) -> bool:
        """Whether ``sizes``, in elements, are those of one table with at least ``self.rows`` rows."""
        if not sizes:
            return True
        rows = sizes[0]
        return rows >= self.rows and sizes == [rows, rows, rows, 4 * rows, rows, rows, 1, 1]


def _disjoint(op: int, lists: Lists, arrays: tuple[Tensor, ...], scaled: bool) -> bool:
    """Whether each tensor that the call writes has its own memory."""
    every = named(op, lists)
    read = {name: every[name] for name in read_lists(op, scaled)} | {"rows": arrays[:2]}
    written = {name: tensors for name, tensors in every.items() if name not in read} | {"table": arrays[2:]}
    try:
        _memory.check_disjoint(written, read)
    except ValueError:
        return False
    return True


@dataclass(slots=True, kw_only=True)
class AddressPlan(Plan):
    """A plan for kernels that take addresses and are launched on a stream.

    Attributes:
        addresses: the expected tensors; reads their addresses at each call.
    """

    addresses: Addresses

    def run(self, op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling) -> bool:
        """See :meth:`Plan.run`."""
        table = None if rows is None else rows.table
        arrays = () if table is None else row_arrays(table)
        addresses = self.addresses.read(op, lists, arrays, scaling.grad_scale is not None)
        if addresses is None:
            return False
        self.launch(op, addresses, options, table, scaling)
        if op != STATISTICS:
            # Autograd does not see the kernels' writes. The version tells it that a tensor has changed.
            increment_version(lists[0])
        return True

    def launch(
        self, op: int, addresses: bytes, options: Options, table: Table | None, scaling: Scaling
    ) -> None:
        """Launch the kernels of a call.

        Args:
            addresses: what :meth:`Addresses.read` returned.
            table: the table of the rows, or None.

        The other arguments are those of :meth:`Plan.run`.

        Raises:
            RuntimeError: the kernels could not be launched.
        """
        raise NotImplementedError


_C: Any = native.load()
