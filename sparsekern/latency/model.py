"""A network's latency as a function of its kept channels: the sum of interpolated tables, one per op."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from sparsekern.graph import ChannelGraph
from sparsekern.latency.axes import POINTS, Axis


class LatencyModel:
    """Nanoseconds of a forward pass for any set of kept channels; made by ``sparsekern.latency.measure``.

    The latency is ``scale * sum(ops) + overhead``. The time of an op is interpolated linearly between the
    timed widths. ``scale`` and ``overhead`` are fitted to timings of whole networks.

    Attributes:
        graph: the channels.
        block: number of channels over which a price is averaged.
        scale: factor of the sum over the ops.
        overhead: nanoseconds of a pass that do not depend on widths.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        axes: Sequence[Axis],
        axes_of: np.ndarray,
        nanoseconds: np.ndarray,
        block: int,
    ) -> None:
        """Create the model.

        Args:
            graph: the channels.
            axes: the widths that ops depend on.
            axes_of: int64 ``[ops, 2]``, the indices in ``axes`` of each op's two axes; -1 for none.
            nanoseconds: float64 ``[ops, POINTS, POINTS]``, times of each op at the grids of its two axes.
            block: number of channels over which a price is averaged.
        """
        self.graph = graph
        self.block = block
        self.scale, self.overhead = 1.0, 0.0
        atoms = graph.costs.shares.atoms
        # The last axis has the constant width 1; it replaces the missing axes of operations.
        fixed = Axis((), 1.0, np.zeros(atoms), 1.0, 1.0, np.ones(1))
        every = [*axes, fixed]
        self._axes_of = np.where(axes_of < 0, len(axes), axes_of)
        self._constant = np.array([axis.constant for axis in every])
        self._of_atom = np.stack([axis.of_atom for axis in every])
        self._step = np.array([axis.step for axis in every])
        # Each grid is padded with infinity behind its last width.
        self._grid = np.full((len(every), POINTS + 1), np.inf)
        for number, axis in enumerate(every):
            self._grid[number, : len(axis.grid)] = axis.grid
        self._last = np.array([len(axis.grid) - 1 for axis in every])
        self._table = np.pad(nanoseconds, ((0, 0), (0, 1), (0, 1)), mode="edge")
        touches = (self._of_atom[self._axes_of] > 0).any(axis=1)
        self._pair_op, self._pair_atom = np.nonzero(touches)

    @property
    def values(self) -> np.ndarray:
        """All measured values, float64 ``[n]``, for transfer to an equal model in another process."""
        return np.append(self._table.ravel(), (self.scale, self.overhead))

    @values.setter
    def values(self, values: np.ndarray) -> None:
        self._table = values[:-2].reshape(self._table.shape).copy()
        self.scale, self.overhead = map(float, values[-2:])

    def cost(self, kept: np.ndarray) -> float:
        """Nanoseconds of a pass with the channels ``kept``, bool ``[C]``."""
        return self.scale * float(self.of_each(kept).sum()) + self.overhead

    def of_each(self, kept: np.ndarray) -> np.ndarray:
        """Nanoseconds of each op for ``kept``, without scale and overhead: float64 ``[ops]``."""
        widths = self._constant + self._of_atom @ self._counts(kept)
        return self._times(np.arange(len(self._table)), widths[self._axes_of])

    def settle(self, alone: np.ndarray, within: np.ndarray) -> None:
        """Correct the tables from ops timed alone to ops timed within the network.

        Each table entry is multiplied by ``within / alone``. This ratio is interpolated linearly in the time
        of the entry and constant beyond the given times.

        Args:
            alone: float64 ``[k, ops]``, nanoseconds by the tables for ``k`` sets of kept channels.
            within: float64 ``[k, ops]``, measured nanoseconds for the same sets.
        """
        for op, (x, y) in enumerate(zip(alone.T, within.T, strict=True)):
            good = (x > 0) & (y > 0)
            if good.any():
                order = np.argsort(x[good])
                ratio = np.interp(self._table[op], x[good][order], (y[good] / x[good])[order])
                self._table[op] *= ratio

    def weigh(self, factors: np.ndarray) -> None:
        """Multiply the table of each op by its factor, float64 ``[ops]``."""
        self._table *= factors[:, None, None]

    def price(self, kept: np.ndarray) -> np.ndarray:
        """Nanoseconds that the removal of each channel saves, float64 ``[C]``; 0 for removed channels.

        Time falls in steps, so the saving is computed for the removal of channels down to the next lower
        multiple of ``block``, and divided by their number.

        Args:
            kept: bool ``[C]``.
        """
        counts = self._counts(kept)
        # Channels above the last multiple of the block are removed together, then one block at a time.
        going = np.where(counts > 0, (counts - 1) % self.block + 1, 0)
        widths = self._constant + self._of_atom @ counts
        axes = self._axes_of[self._pair_op]
        less = self._of_atom[axes, self._pair_atom[:, None]] * going[self._pair_atom][:, None]
        now = self._times(np.arange(len(self._table)), widths[self._axes_of])
        then = self._times(self._pair_op, widths[axes] - less)
        saved = np.bincount(self._pair_atom, now[self._pair_op] - then, minlength=len(counts))
        per_channel = self.scale * saved / np.maximum(going, 1)
        return np.where(kept, per_channel[self.graph.costs.atom_of], 0.0)

    def restrict(self, graph: ChannelGraph) -> LatencyModel:
        """A copy of this model for ``graph``, a result of ``ChannelGraph.restrict`` on this model's graph."""
        restricted = copy.copy(self)
        restricted.graph = graph
        return restricted

    def _counts(self, kept: np.ndarray) -> np.ndarray:
        """Number of kept channels of each atom, int64 ``[atoms]``."""
        return np.bincount(self.graph.costs.atom_of[kept], minlength=self._of_atom.shape[1])

    def _times(self, ops: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Nanoseconds of the operations ``ops`` (int64 ``[n]``) at ``widths`` (``[n, 2]``), ``[n]``."""
        axes = self._axes_of[ops]
        step = self._step[axes]
        # A width takes as long as the next higher multiple of the step.
        widths = np.where(step > 0, np.ceil(widths / np.maximum(step, 1e-9)) * step, widths)
        grid = self._grid[axes]
        low = np.clip((grid < widths[..., None]).sum(axis=-1) - 1, 0, np.maximum(self._last[axes] - 1, 0))
        left = np.take_along_axis(grid, low[..., None], axis=-1)[..., 0]
        right = np.take_along_axis(grid, low[..., None] + 1, axis=-1)[..., 0]
        share = np.clip((widths - left) / (right - left), 0.0, 1.0)
        (i, j), (s, t) = low.T, share.T
        corners = self._table
        return (
            (1 - s) * (1 - t) * corners[ops, i, j]
            + s * (1 - t) * corners[ops, i + 1, j]
            + (1 - s) * t * corners[ops, i, j + 1]
            + s * t * corners[ops, i + 1, j + 1]
        )
