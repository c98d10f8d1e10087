"""Per-row arrays over the tracked parameters of a model.

A *row* is one output channel of one parameter: index ``r`` along the parameter's logical dimension
``dim``. Rows of all tracked parameters are numbered through, parameter after parameter, and
everything known about them lives in flat arrays of length ``R`` (the number of rows), so that a
kernel sees one pointer per quantity and a checkpoint holds a handful of tensors instead of some per
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekern.files.schema import Anything, Array, Fields, Real

LIVE = -1
"""Countdown of a live row. A declining row has the steps that are left, a masked row 0."""

COUNT, DOT, GRAD_SQ, WEIGHT_SQ = range(4)
"""Columns of :attr:`RowTable.sums`."""


@dataclass(frozen=True, eq=False)
class RowView:
    """The rows of one parameter.

    Attributes:
        param: the parameter.
        dim: its dimension that counts rows (0, or 1 for a transposed convolution).
        start: index of its first row in the flat arrays.
        rows: number of its rows, ``param.shape[dim]``.
    """

    param: Parameter
    dim: int
    start: int
    rows: int

    @property
    def slice(self) -> slice:
        """Where these rows lie in the flat arrays."""
        return slice(self.start, self.start + self.rows)


class RowArrays(NamedTuple):
    """What a step needs of a :class:`RowTable`, by the same names (see there for shapes)."""

    penalty: Tensor
    elements: Tensor
    countdown: Tensor
    sums: Tensor
    threshold: Tensor
    activity: Tensor
    nonfinite: Tensor
    pending: Tensor
    tau: float
    decay: float


class ChannelArrays(NamedTuple):
    """What ``channel_moments_`` needs of a :class:`RowTable`, by the same names."""

    gate_offsets: Tensor
    gate_rows: Tensor
    sums: Tensor
    channel_dot: Tensor
    channel_dot_sq: Tensor
    updates: Tensor
    pending: Tensor
    decay: float


@dataclass(eq=False, slots=True)
class Rows:
    """Which rows the tensors of one list have.

    Attributes:
        table: the flat arrays, or None when no tensor of the list is tracked.
        starts: per tensor, the index of its first row in the flat arrays; -1 when it is not
            tracked.
        dims: per tensor, the dimension that counts rows (any value when it is not tracked).
    """

    table: RowTable | RowArrays | None
    starts: list[int]
    dims: list[int]


class RowTable:
    """Flat per-row and per-channel arrays, owned by whoever prunes, written by the optimizer step.

    With ``R`` rows, ``C`` channels and ``G`` gate rows, all on the device of the parameters:

    Attributes:
        views: one :class:`RowView` per tracked parameter, in the order given.
        index: the same by ``id(param)``.
        penalty: float32 ``[R]``; extra weight decay of the row (0 = none).
        elements: float32 ``[R]``; how many elements of the row are not in columns of masked channels, which
            are zero with their gradients; at least 1, and the same for all rows of a parameter. Not in
            :meth:`state_dict`: it follows from the masks.
        countdown: int32 ``[R]``; :data:`LIVE`, steps left of a decline, or 0 when masked.
        sums: float32 ``[R, 4]``; count, dot, grad_sq, weight_sq of the last step. All 0 in a masked
            row and in one whose sums were not finite. ``dot`` is consumed (set to 0) by
            ``channel_moments_``.
        threshold: float32 ``[R]``; what ``|gradient|`` has to exceed in the next step to be
            counted.
        activity: float32 ``[R]``; exponential mean of ``count / elements``, in [0, 1].
        nonfinite: int64 ``[]``; how many rows of how many steps were left out for non-finite sums.
        pending: float32 ``[]``; 1 between a step that filled ``sums`` and ``channel_moments_``,
            else 0.
        gate_offsets: int64 ``[C + 1]``; gate_rows: int64 ``[G]``; the gates of channel ``c`` are
            the rows ``gate_rows[gate_offsets[c]:gate_offsets[c + 1]]``.
        channel_dot: float32 ``[C]``; exponential mean of the sum over a channel's gates of ``dot``.
        channel_dot_sq: float32 ``[C]``; exponential mean of the square of that sum.
        updates: float32 ``[]``; steps that entered the means. ``mean / (1 - decay**updates)`` is
            unbiased.
        tau: factor of the threshold.
        decay: of the exponential means.
    """

    _PER_ROW = ("penalty", "countdown", "sums", "threshold", "activity")
    _PER_CHANNEL = ("channel_dot", "channel_dot_sq")
    _ARRAYS = (*_PER_ROW, "nonfinite", *_PER_CHANNEL, "updates")
    _STRUCTURE = ("gate_offsets", "gate_rows")

    def __init__(
        self,
        params: Sequence[tuple[Parameter, int]],
        gates: Sequence[Any] | tuple[Any, Any],
        *,
        tau: float = 1.0,
        decay: float = 0.99,
    ) -> None:
        """Arrays for ``params``, all rows live, no statistics yet.

        Args:
            params: ``(parameter, dimension of its rows)`` of every tracked parameter, on one
                device.
            gates: per channel the indices of its gates' rows (1-D integer arrays), or the same as a
                pair ``(offsets [C + 1], rows [G])``.
            tau: factor of the threshold, > 0.
            decay: of the exponential means, in [0, 1).

        Raises:
            ValueError: a dimension, gate, ``tau`` or ``decay`` out of range, a parameter given
                twice, or parameters on several devices.
        """
        if not tau > 0:
            raise ValueError(f"tau: got {tau!r}, expected a number > 0")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay!r}, expected a number in [0, 1)")
        self.tau = float(tau)
        self.decay = float(decay)
        self.views = _views(params)
        self.index = {id(view.param): view for view in self.views}
        rows = sum(view.rows for view in self.views)
        offsets, gate_rows = _csr(gates, rows)
        device = self.views[0].param.device if self.views else torch.device("cpu")
        self._allocate(rows, len(offsets) - 1, device)
        for view in self.views:
            self.elements[view.slice] = max(1, view.param.numel() // max(1, view.rows))
        self.gate_offsets = torch.from_numpy(offsets).to(device)
        self.gate_rows = torch.from_numpy(gate_rows).to(device)
        self.refresh()

    def _allocate(self, rows: int, channels: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.penalty = zeros(rows)
        self.elements = zeros(rows)
        self.countdown = torch.full((rows,), LIVE, dtype=torch.int32, device=device)
        self.sums = zeros(rows, 4)
        self.threshold = torch.full((rows,), float("inf"), device=device, dtype=torch.float32)
        self.activity = zeros(rows)
        self.nonfinite = zeros(dtype=torch.int64)
        self.pending = zeros()
        self.channel_dot = zeros(channels)
        self.channel_dot_sq = zeros(channels)
        self.updates = zeros()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The keys of `index` are addresses: a copy or an unpickled table has other ones.
        self.__dict__.update(state)
        self.index = {id(view.param): view for view in self.views}

    def refresh(self) -> None:
        """Recount the masked rows; to be called after ``countdown`` was changed from Python.

        Reads the device once. Sets :attr:`masked`, the number of masked rows of each view as it was
        at this call (declines that end later do not show in it), which backends may use to choose
        how to walk a tensor.
        """
        masked = (self.countdown == 0).cpu().numpy()
        self.masked = [int(masked[view.slice].sum()) for view in self.views]

    def settle(self) -> None:
        """Bring the arrays up to date. They always are, unless a step is shared between processes."""

    def rows_of(self, params: Iterable[Tensor]) -> Rows:
        """The :class:`Rows` of a list of parameters, tracked or not."""
        views = [self.index.get(id(param)) for param in params]
        starts = [view.start if view else -1 for view in views]
        dims = [view.dim if view else 0 for view in views]
        return Rows(self if any(views) else None, starts, dims)

    @torch.no_grad()
    def zero_masked(self, states: Callable[[Parameter], Iterable[Tensor]]) -> None:
        """Set the masked rows of every tracked parameter and of its optimizer state to zero.

        Kernels skip masked rows on the understanding that this was done when the mask was set, and
        again after anything loaded weights or state.

        Args:
            states: gives the optimizer state of a parameter; tensors of another shape than the
                parameter's (``step``) are left alone.
        """
        for view in self.views:
            masked = self.countdown[view.slice] == 0
            shape = [1] * view.param.dim()
            shape[view.dim] = view.rows
            mask = masked.reshape(shape)
            view.param.masked_fill_(mask, 0)
            for state in states(view.param):
                if state.shape == view.param.shape:
                    state.masked_fill_(mask, 0)

    def state_dict(self) -> dict[str, Any]:
        """All arrays (not copied), ``tau`` and ``decay``."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self._ARRAYS + self._STRUCTURE}
        return state | {"tau": self.tau, "decay": self.decay}

    def restricted(self, rows: np.ndarray, channels: np.ndarray) -> dict[str, Any]:
        """What :meth:`state_dict` of a table that has only some of the rows and channels would be.

        Args:
            rows: bool ``[R]``; gates of a kept channel are kept, those of others are not.
            channels: bool ``[C]``.
        """
        offsets = self.gate_offsets.cpu().numpy()
        gates = self.gate_rows.cpu().numpy()
        counts = np.diff(offsets)
        left = (np.cumsum(rows) - 1)[gates[np.repeat(channels, counts)]]
        starts = np.concatenate([[0], np.cumsum(counts[channels])]).astype(np.int64)
        state = self.state_dict()
        device = self.countdown.device
        for kept, names in ((rows, self._PER_ROW), (channels, self._PER_CHANNEL)):
            index = torch.from_numpy(np.flatnonzero(kept)).to(device)
            state |= {name: state[name].index_select(0, index) for name in names}
        structure = zip(self._STRUCTURE, (starts, left), strict=True)
        return state | {name: torch.from_numpy(values).to(device) for name, values in structure}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what :meth:`state_dict` gave into the arrays of this table, in place.

        Raises:
            ValueError: an entry is missing, has another shape or dtype or is no number in range, or the
                gates are those of another model; nothing has been changed then.
        """
        self.check(state, self.state_dict())
        for name in self._ARRAYS:
            getattr(self, name).copy_(state[name])
        self.pending.zero_()
        self.tau = float(state["tau"])
        self.decay = float(state["decay"])
        self.refresh()

    @classmethod
    def check(cls, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """``state`` can be loaded into a table whose own state is ``expected``.

        Raises:
            ValueError: as :meth:`load_state_dict`.
        """
        arrays = {name: expected[name] for name in cls._ARRAYS + cls._STRUCTURE}
        rules = {name: Array(tuple(own.shape), own.dtype) for name, own in arrays.items()}
        numbers = {"tau": Real(positive=True), "decay": Real(0, 1)}
        Fields({**numbers, **rules}, others=Anything()).check(state, "state")
        for name in cls._STRUCTURE:
            if not torch.equal(expected[name], state[name].to(expected[name].device)):
                raise ValueError(f"state[{name!r}]: got the gates of another model")


def _views(params: Sequence[tuple[Parameter, int]]) -> list[RowView]:
    views: list[RowView] = []
    seen: set[int] = set()
    start = 0
    for position, (param, dim) in enumerate(params):
        if not 0 <= dim < param.dim():
            raise ValueError(
                f"params[{position}]: got dimension {dim}, expected one in [0, {param.dim()}) "
                f"of a parameter of shape {list(param.shape)}"
            )
        if id(param) in seen:
            raise ValueError(f"params[{position}]: got a parameter a second time, expected it once")
        if views and param.device != views[0].param.device:
            raise ValueError(
                f"params[{position}]: got a parameter on {param.device}, "
                f"expected all on {views[0].param.device} as the first"
            )
        seen.add(id(param))
        views.append(RowView(param, dim, start, param.shape[dim]))
        start += param.shape[dim]
    return views


def _csr(gates: Sequence[Any] | tuple[Any, Any], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """``(offsets, rows)`` of ``gates`` given either way, checked against the number of rows."""
    offsets: np.ndarray
    gate_rows: np.ndarray
    if isinstance(gates, tuple):
        offsets = np.array(gates[0], dtype=np.int64)
        gate_rows = np.array(gates[1], dtype=np.int64)
    else:
        parts = [np.asarray(gate, dtype=np.int64).reshape(-1) for gate in gates]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        gate_rows = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    check_gates(offsets, gate_rows, rows)
    return offsets, gate_rows


def check_gates(offsets: np.ndarray, gate_rows: np.ndarray, rows: int) -> None:
    """The gates of every channel are rows of a table.

    Args:
        offsets: integers ``[C + 1]``; gate_rows: integers ``[G]``; as in :class:`RowTable`.
        rows: how many the table has.

    Raises:
        ValueError: offsets that do not rise from 0 to G, or a row outside the table.
    """
    ends_fit = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(gate_rows)
    if not ends_fit or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"gates: got offsets from {offsets[:1]} to {offsets[-1:]}, expected them to rise "
            f"from 0 to the number of gate rows, {len(gate_rows)}"
        )
    if len(gate_rows) and not (gate_rows.min() >= 0 and gate_rows.max() < rows):
        raise ValueError(
            f"gates: got rows from {gate_rows.min()} to {gate_rows.max()}, expected them in [0, {rows})"
        )
