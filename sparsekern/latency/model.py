"""A network's latency as a function of its kept channels: tables of its ops, interpolated and added up."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from sparsekern.graph import ChannelGraph
from sparsekern.latency.axes import POINTS, Axis


class LatencyModel:
    """Nanoseconds of a forward pass for any set of kept channels, as ``sparsekern.latency.measure`` found.

    The sum of what the ops take at their widths, linear between the widths that were timed, times
    ``scale``, plus ``overhead``: what whole networks were found to take beside their ops.

    Attributes:
        graph: the channels.
        block: channels that a price is averaged over.
        scale: of the sum of the ops.
        overhead: nanoseconds of a pass that no width changes.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        axes: Sequence[Axis],
        axes_of: np.ndarray,
        nanoseconds: np.ndarray,
        block: int,
    ) -> None:
        """``axes_of`` (int64 ``[ops, 2]``, -1 for none) says on which axes the times of each op lie.

        ``nanoseconds`` are float64 ``[ops, POINTS, POINTS]``, at the grids of the two axes.
        """
        self.graph = graph
        self.block = block
        self.scale, self.overhead = 1.0, 0.0
        atoms = graph.costs.shares.atoms
        # What no axis of an operation is: the last one, of the constant width 1.
        fixed = Axis((), 1.0, np.zeros(atoms), 1.0, 1.0, np.ones(1))
        every = [*axes, fixed]
        self._axes_of = np.where(axes_of < 0, len(axes), axes_of)
        self._constant = np.array([axis.constant for axis in every])
        self._of_atom = np.stack([axis.of_atom for axis in every])
        self._step = np.array([axis.step for axis in every])
        # Beyond the last width of a grid lies one that is never reached.
        self._grid = np.full((len(every), POINTS + 1), np.inf)
        for number, axis in enumerate(every):
            self._grid[number, : len(axis.grid)] = axis.grid
        self._last = np.array([len(axis.grid) - 1 for axis in every])
        self._table = np.pad(nanoseconds, ((0, 0), (0, 1), (0, 1)), mode="edge")
        touches = (self._of_atom[self._axes_of] > 0).any(axis=1)
        self._pair_op, self._pair_atom = np.nonzero(touches)

    @property
    def values(self) -> np.ndarray:
        """All that was measured, float64 ``[n]``: to be handed to an equal model of another process."""
        return np.append(self._table.ravel(), (self.scale, self.overhead))

    @values.setter
    def values(self, values: np.ndarray) -> None:
        self._table = values[:-2].reshape(self._table.shape).copy()
        self.scale, self.overhead = map(float, values[-2:])

    def cost(self, kept: np.ndarray) -> float:
        """Nanoseconds of a pass with the channels ``kept``, bool ``[C]``."""
        return self.scale * float(self.of_each(kept).sum()) + self.overhead

    def of_each(self, kept: np.ndarray) -> np.ndarray:
        """Nanoseconds of each op, neither scaled nor with the overhead, float64 ``[ops]``."""
        widths = self._constant + self._of_atom @ self._counts(kept)
        return self._times(np.arange(len(self._table)), widths[self._axes_of])

    def settle(self, alone: np.ndarray, within: np.ndarray) -> None:
        """Correct the tables: ops that they say take ``alone`` were found to take ``within``.

        Both are nanoseconds, float64 ``[k, ops]``, of the same ``k`` sets of channels; between and beyond
        those the ratio of the two is interpolated in the time.
        """
        for op, (x, y) in enumerate(zip(alone.T, within.T, strict=True)):
            good = (x > 0) & (y > 0)
            if good.any():
                order = np.argsort(x[good])
                ratio = np.interp(self._table[op], x[good][order], (y[good] / x[good])[order])
                self._table[op] *= ratio

    def price(self, kept: np.ndarray) -> np.ndarray:
        """Nanoseconds that a channel's removal saves, float64 ``[C]``; 0 for those not kept.

        It is the mean over the channels that go with it to the next multiple of ``block`` below, since time
        falls in steps.
        """
        counts = self._counts(kept)
        # What is over the last multiple goes together, and then a block at a time.
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
        """The same latencies for ``graph``, what ``ChannelGraph.restrict`` made of this one's."""
        restricted = copy.copy(self)
        restricted.graph = graph
        return restricted

    def _counts(self, kept: np.ndarray) -> np.ndarray:
        return np.bincount(self.graph.costs.atom_of[kept], minlength=self._of_atom.shape[1])

    def _times(self, ops: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Nanoseconds of the operations ``ops`` (int64 ``[n]``) at ``widths`` (``[n, 2]``), ``[n]``."""
        axes = self._axes_of[ops]
        step = self._step[axes]
        # Widths up to the next multiple of the step take as long as that one.
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
