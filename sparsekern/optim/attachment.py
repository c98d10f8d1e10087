"""The handle of a row table that an optimizer processes."""

from __future__ import annotations

from collections.abc import Callable

from sparsekern.kernels.rows import RowTable


class Attachment:
    """A table's attachment to an optimizer, to be undone by :meth:`remove`."""

    def __init__(
        self, attach: Callable[[RowTable], object], remove: Callable[[RowTable], object], table: RowTable
    ) -> None:
        """Keep the way to attach another table.

        Args:
            attach: attaches a table to the optimizer.
            remove: removes a table from it, if it is attached.
            table: the table that is attached.
        """
        self._attach, self._remove = attach, remove
        self._table = table

    def remove(self) -> None:
        """Detach this table; does nothing if it is detached already."""
        self._remove(self._table)

    def replace(self, table: RowTable) -> None:
        """Detach this table and attach ``table``, which describes parameters whose shapes have changed."""
        self.remove()
        self._attach(table)
        self._table = table
