"""Per-row arrays over the tracked parameters of a model.

A *row* is one output channel of one parameter: index ``r`` along the parameter's logical dimension ``dim``.
The rows of all tracked parameters are numbered consecutively, parameter after parameter. All data about rows
are in flat arrays of length ``R`` (the number of rows). So a kernel gets one pointer per quantity, and the
number of tensors in a checkpoint does not depend on the number of layers.
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
"""Countdown of a live row. That of a fading row is the number of steps left, that of a masked row 0."""

COUNT, DOT, GRAD_SQ, WEIGHT_SQ = range(4)
"""Columns of :attr:`RowTable.sums`."""


@dataclass(frozen=True, eq=False)
class RowView:
    """The rows of one parameter.

    Attributes:
        param: the parameter.
        dim: row dimension of the parameter (0, or 1 for a transposed convolution).
        start: index of the first row in the flat arrays.
        rows: number of rows, ``param.shape[dim]``.
    """

    param: Parameter
    dim: int
    start: int
    rows: int

    @property
    def slice(self) -> slice:
        """Position of the rows in the flat arrays."""
        return slice(self.start, self.start + self.rows)


class RowArrays(NamedTuple):
    """The fields of a :class:`RowTable` that a step uses, with the same names and shapes."""

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
    """The fields of a :class:`RowTable` that ``channel_moments_`` uses, with the same names and shapes."""

    gate_offsets: Tensor
    gate_rows: Tensor
    sums: Tensor
    channel_dot: Tensor
    channel_dot_sq: Tensor
    updates: Tensor
    pending: Tensor
    decay: float


ROW_ARRAYS = RowArrays._fields[:-2]
"""Names of the flat arrays that a step uses, in the order of ``RowArrays`` in csrc/abi.h."""

ROW_INPUTS, ROW_STATE = ROW_ARRAYS[:2], ROW_ARRAYS[2:]
"""Names of the arrays that a step only reads, and of those that it writes."""

CHANNEL_ARRAYS = ChannelArrays._fields[:-1]
"""Names of the arrays of ``channel_moments_``, in the order of the native structs."""


@dataclass(eq=False, slots=True)
class Rows:
    """The rows of the tensors of one list.

    Attributes:
        table: the flat arrays, or None when no tensor of the list is tracked.
        starts: for each tensor, the index of its first row in the flat arrays; -1 when it is not tracked.
        dims: for each tensor, its row dimension; any value when it is not tracked.
    """

    table: RowTable | RowArrays | None
    starts: list[int]
    dims: list[int]


class RowTable:
    """Flat per-row and per-channel arrays. The pruner owns them, and the optimizer step writes them.

    ``R`` is the number of rows, ``C`` of channels and ``G`` of gate rows. All arrays are on the device of the
    parameters.

    Attributes:
        views: one :class:`RowView` per tracked parameter, in the order of ``params``.
        index: the views, keyed by ``id(param)``.
        penalty: float32 ``[R]``; extra weight decay of the row, 0 for none.
        elements: float32 ``[R]``; number of elements of the row outside of the columns of masked channels, at
            least 1. (In those columns elements and gradients are 0.) All rows of a parameter have the same
            number. It is not in :meth:`state_dict`, because it follows from the masks.
        countdown: int32 ``[R]``; :data:`LIVE`, the steps left of a fade-out, or 0 for a masked row.
        sums: float32 ``[R, 4]``; count, dot, grad_sq and weight_sq of the last step. All four are 0 in a
            masked row and in a row with non-finite sums. ``channel_moments_`` reads ``dot`` and sets it to 0.
        threshold: float32 ``[R]``; the next step counts the elements whose ``|gradient|`` exceeds it.
        activity: float32 ``[R]``; exponential mean of ``count / elements``, in [0, 1].
        nonfinite: int64 ``[]``; number of rows, over all steps, that were left out for non-finite sums.
        pending: float32 ``[]``; 1 between a step that filled ``sums`` and ``channel_moments_``,
            else 0.
        gate_offsets: int64 ``[C + 1]``; the gates of channel ``c`` are the rows
            ``gate_rows[gate_offsets[c]:gate_offsets[c + 1]]``.
        gate_rows: int64 ``[G]``; the gate rows of all channels, channel after channel.
        channel_dot: float32 ``[C]``; exponential mean of the sum of ``dot`` over the gates of a channel.
        channel_dot_sq: float32 ``[C]``; exponential mean of the square of that sum.
        updates: float32 ``[]``; number of steps in the means. ``mean / (1 - decay**updates)`` is unbiased.
        tau: factor of the threshold.
        decay: decay of the exponential means per step, in [0, 1).
        masked: number of masked rows of each view at the last :meth:`refresh`.
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
        """Make the arrays for ``params``, with all rows live and without statistics.

        Args:
            params: ``(parameter, row dimension)`` of each tracked parameter. All are on one device.
            gates: for each channel the indices of its gate rows (1-D integer arrays), or the same as a
                pair ``(offsets [C + 1], rows [G])``.
            tau: factor of the threshold, > 0.
            decay: decay of the exponential means per step, in [0, 1).

        Raises:
            ValueError: a dimension, gate, ``tau`` or ``decay`` is out of range, a parameter occurs
                twice, or the parameters are on several devices.
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
        # The keys of `index` are ids, and the parameters of a copied or unpickled table have new ids.
        self.__dict__.update(state)
        self.index = {id(view.param): view for view in self.views}

    def refresh(self) -> None:
        """Update :attr:`masked`; call this after Python code changed ``countdown``.

        The call waits for the device once. Fade-outs that end later do not change :attr:`masked`. Backends
        may use it to choose how they process a tensor.
        """
        masked = (self.countdown == 0).cpu().numpy()
        self.masked = [int(masked[view.slice].sum()) for view in self.views]

    def settle(self) -> None:
        """Bring the arrays up to date. This does nothing here; tables shared by processes override it."""

    def rows_of(self, params: Iterable[Tensor]) -> Rows:
        """The :class:`Rows` of a list of parameters, tracked or not."""
        views = [self.index.get(id(param)) for param in params]
        starts = [view.start if view else -1 for view in views]
        dims = [view.dim if view else 0 for view in views]
        return Rows(self if any(views) else None, starts, dims)

    @torch.no_grad()
    def zero_masked(self, states: Callable[[Parameter], Iterable[Tensor]]) -> None:
        """Set the masked rows of each tracked parameter and of its optimizer state to zero.

        Kernels skip masked rows. So the caller has to call this after each change of the masks, and after
        each load of weights or optimizer state.

        Args:
            states: returns the optimizer state of a parameter. Tensors whose shape differs from the
                parameter's, such as ``step``, are not changed.
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
        """The arrays (not copied), ``tau`` and ``decay``, keyed by their names."""
        state: dict[str, Any] = {name: getattr(self, name) for name in self._ARRAYS + self._STRUCTURE}
        return state | {"tau": self.tau, "decay": self.decay}

    def restricted(self, rows: np.ndarray, channels: np.ndarray) -> dict[str, Any]:
        """The :meth:`state_dict` of a table with only some of the rows and channels.

        Args:
            rows: bool ``[R]``; True for rows to keep. Gates lose the other rows.
            channels: bool ``[C]``; True for channels to keep.

        Returns:
            A state with the keys of :meth:`state_dict`.
        """
        offsets = self.gate_offsets.cpu().numpy()
        gates = self.gate_rows.cpu().numpy()
        channel = np.repeat(np.arange(len(channels)), np.diff(offsets))
        held = channels[channel] & rows[gates]
        left = (np.cumsum(rows) - 1)[gates[held]]
        counts = np.bincount(channel[held], minlength=len(channels))[channels]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        state = self.state_dict()
        device = self.countdown.device
        for kept, names in ((rows, self._PER_ROW), (channels, self._PER_CHANNEL)):
            index = torch.from_numpy(np.flatnonzero(kept)).to(device)
            state |= {name: state[name].index_select(0, index) for name in names}
        structure = zip(self._STRUCTURE, (starts, left), strict=True)
        return state | {name: torch.from_numpy(values).to(device) for name, values in structure}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the result of :meth:`state_dict` into the arrays of this table, in place.

        Raises:
            ValueError: an entry is missing, has another shape or dtype or is out of range, or the gates
                belong to another model; nothing has changed then.
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
        """Check that ``state`` can be loaded into a table with the state ``expected``.

        Raises:
            ValueError: as in :meth:`load_state_dict`.
        """
        arrays = {name: expected[name] for name in cls._ARRAYS + cls._STRUCTURE}
        rules = {name: Array(tuple(own.shape), own.dtype) for name, own in arrays.items()}
        numbers = {"tau": Real(positive=True), "decay": Real(0, 1)}
        Fields({**numbers, **rules}, others=Anything()).check(state, "state")
        for name in cls._STRUCTURE:
            if not torch.equal(expected[name], state[name].to(expected[name].device)):
                raise ValueError(f"state[{name!r}]: got the gates of another model")


Table = RowTable | RowArrays
"""The flat arrays that a step uses."""


def _views(params: Sequence[tuple[Parameter, int]]) -> list[RowView]:
    """Number the rows of all parameters consecutively.

    Raises:
        ValueError: as in the constructor of :class:`RowTable`.
    """
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
    """``(offsets [C + 1], rows [G])`` of ``gates`` in either form, checked against the number of rows."""
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
    """Check that the gates of all channels are rows of a table.

    Args:
        offsets: integers ``[C + 1]``, as in :class:`RowTable`.
        gate_rows: integers ``[G]``, as in :class:`RowTable`.
        rows: number of rows of the table.

    Raises:
        ValueError: the offsets do not rise from 0 to G, or a row is outside of the table.
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
