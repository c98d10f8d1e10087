"""Rows of parameters that are sharded over processes, as by ``fully_shard`` (FSDP2).

Some statistics add up over the parts of a row, others do not:

* count, dot, grad_sq and weight_sq are sums over elements, so their parts add up.
* A threshold needs the sums of *all* rows of its tensor. A channel's ``dot`` needs rows that may lie in
  several processes, and its square needs the complete ``dot``. Neither follows from one process's parts, and
  neither can wait until the next decision.

So every process keeps the arrays of all rows. After each step one all-reduce of 24 bytes a row adds the
statistics of all processes. It starts right after the step and ends before the next one, so it overlaps with
the forward and the backward pass. All processes decide from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.distributed.tensors import Part, is_sharded, local, part_of
from sparsekern.kernels.ops import channel_moments_
from sparsekern.kernels.rows import COUNT, GRAD_SQ, WEIGHT_SQ, RowTable, RowView

# Columns of a row in the all-reduce: the 4 sums, the number of counted parts, and the countdown.
_COLUMNS = 6
_PARTS, _COUNTDOWN = 4, 5
# Scalars after the rows: processes that trained in the step, updates, rows that are not finite.
_SCALARS = 3


def row_table(
    params: Sequence[tuple[Parameter, int]], gates: tuple[np.ndarray, np.ndarray], *, decay: float
) -> RowTable:
    """The table of these parameters, a :class:`ShardedTable` if one of them is a DTensor.

    Raises:
        ValueError: see :class:`ShardedTable`.
    """
    if any(is_sharded(param) for param, _ in params):
        return ShardedTable(params, gates, decay=decay)
    return RowTable(params, gates, decay=decay)


def attach(optimizer: Optimizer, table: RowTable) -> optim.Attachment | optim.RowHooks | Handle:
    """As :func:`sparsekern.optim.attach`, for sharded and other tables."""
    return Handle(optimizer, table) if isinstance(table, ShardedTable) else optim.attach(optimizer, table)


def changes_nothing(optimizer: Optimizer) -> bool:
    """Whether all learning rates and all gradients of this process are 0.

    ``torch.distributed.checkpoint`` makes such a step to create an optimizer's state. Its rates lie on the
    CPU, so the function does not read a rate on a GPU.
    """
    groups = optimizer.param_groups
    rates = [group.get("lr") for group in groups]
    if any((isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0 for rate in rates):
        return False
    grads = (param.grad for group in groups for param in group["params"] if param.grad is not None)
    return not any(bool(local(grad).any()) for grad in grads)


class Handle:
    """Attaches a sharded table to an optimizer; :meth:`remove` undoes this."""

    def __init__(self, optimizer: Optimizer, table: ShardedTable) -> None:
        self._table = table
        # This hook comes first: with an external optimizer, hooks before the step take the statistics.
        self._before = optimizer.register_step_pre_hook(lambda *_: self._table.before_step())
        try:
            self._handle = optim.attach(optimizer, table.local)
        except Exception:
            self._before.remove()
            raise
        self._after = optimizer.register_step_post_hook(
            lambda optimizer, *_: self._table.after_step(not changes_nothing(optimizer))
        )

    def replace(self, table: RowTable) -> None:
        """Use another table of the same optimizer from now on."""
        assert isinstance(table, ShardedTable)
        self._handle.replace(table.local)
        self._table = table

    def remove(self) -> None:
        """Remove all hooks and the local table from the optimizer."""
        for handle in (self._before, self._handle, self._after):
            handle.remove()


class LocalTable(RowTable):
    """The rows, or parts of rows, that this process holds; its optimizer's step uses this table.

    Its means have a decay of 0: after a step, they are the values of that step.

    Attributes:
        owners: for each view, the parameter whose local part is ``view.param``.
    """

    def __init__(self, parts: Sequence[tuple[Parameter, int]], device: torch.device) -> None:
        self.owners = [param for param, _ in parts]
        tensors: list[Any] = [(local(param), dim) for param, dim in parts]
        rows = sum(tensor.shape[dim] for tensor, dim in tensors)
        # Every row is its own channel, so that the table keeps its dot.
        super().__init__(tensors, (np.arange(rows + 1), np.arange(rows)), decay=0.0)
        self.index = {id(param): view for param, view in zip(self.owners, self.views, strict=True)}

    @torch.no_grad()
    def zero_masked(self, states: Callable[[Parameter], Iterable[Tensor]]) -> None:
        """See :meth:`RowTable.zero_masked`; it zeroes the local parts of DTensors."""
        for owner, view in zip(self.owners, self.views, strict=True):
            part = local(owner)
            shape = [1] * part.dim()
            shape[view.dim] = view.rows
            mask = (self.countdown[view.slice] == 0).reshape(shape)
            part.masked_fill_(mask, 0)
            for state in map(local, states(owner)):
                if state.shape == part.shape:
                    state.masked_fill_(mask, 0)


class ShardedTable(RowTable):
    """A table of all rows of parameters of which each process holds a part.

    After :meth:`settle` its arrays are equal in all processes.

    Raises:
        ValueError: a DTensor is sharded along two dimensions of its mesh, or DTensors are sharded over
            different processes.
    """

    def __init__(
        self,
        params: Sequence[tuple[Parameter, int]],
        gates: tuple[np.ndarray, np.ndarray],
        *,
        decay: float,
        tau: float = 1.0,
    ) -> None:
        parts = [part_of(param) if is_sharded(param) else None for param, _ in params]
        self._group = _common_group(parts)
        self._local: LocalTable | None = None
        super().__init__(params, gates, tau=tau, decay=decay)
        layout = [_rows_here(view, part) for view, part in zip(self.views, parts, strict=True)]
        held = [i for i, here in enumerate(layout) if len(here.rows)]
        device = self.countdown.device
        first = dist.get_rank(self._group) == 0
        self._local = LocalTable([params[i] for i in held], device)

        def spread(values: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(values or [np.zeros(0)])).to(device)

        sizes = [len(layout[i].rows) for i in held]
        self._rows = spread([layout[i].rows for i in held]).long()
        # Only the first process counts a parameter that all processes hold whole.
        counts = [first or not layout[i].everywhere for i in held]
        leads = [counted and layout[i].first for i, counted in zip(held, counts, strict=True)]
        self._counts = spread([np.repeat(float(c), n) for c, n in zip(counts, sizes, strict=True)]).float()
        self._leads = spread([np.repeat(float(c), n) for c, n in zip(leads, sizes, strict=True)]).float()
        self._expected = spread(
            [np.repeat(float(h.parts), v.rows) for h, v in zip(layout, self.views, strict=True)]
        ).float()
        offsets = np.array([view.start for view in self.views] + [len(self.countdown)])
        self._offsets = torch.from_numpy(offsets).to(device)
        self._lengths = torch.diff(self._offsets)
        self._sum = torch.zeros(len(self.countdown) * _COLUMNS + _SCALARS, device=device)
        self._trained = torch.ones((), device=device)
        self._work: Any = None
        self.refresh()

    @property
    def local(self) -> LocalTable:
        """The table that this process's optimizer uses."""
        assert self._local is not None
        return self._local

    def refresh(self) -> None:
        """See :meth:`RowTable.refresh`; this also updates the local table."""
        super().refresh()
        # The base class calls this before the local table exists.
        if self._local is not None:
            torch.index_select(self.countdown, 0, self._rows, out=self.local.countdown)
            self.local.refresh()

    def zero_masked(self, states: Callable[[Parameter], Iterable[Tensor]]) -> None:
        """See :meth:`RowTable.zero_masked`; each process zeroes its parts."""
        self.local.zero_masked(states)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`RowTable.state_dict`; all processes get the same state, whatever their number."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`RowTable.load_state_dict`."""
        self.settle()
        super().load_state_dict(state)

    def before_step(self) -> None:
        """Copy the inputs of the coming step into the local table."""
        self.settle()
        torch.index_select(self.threshold, 0, self._rows, out=self.local.threshold)
        torch.index_select(self.penalty, 0, self._rows, out=self.local.penalty)
        # The step overwrites this with a share in [0, 1] for each finite row that takes part.
        self.local.activity.fill_(-1)
        self.local.updates.zero_()

    @torch.no_grad()
    def after_step(self, trained: bool) -> None:
        """Start the all-reduce of the step's statistics; ``trained`` is for :meth:`trained`."""
        here = self.local
        counted = (here.activity >= 0) * self._counts
        columns = torch.empty(len(counted), _COLUMNS, device=counted.device)
        torch.mul(here.sums, counted[:, None], out=columns[:, :_PARTS])
        columns[:, 1] = here.channel_dot * counted
        columns[:, _PARTS] = counted
        columns[:, _COUNTDOWN] = here.countdown * self._leads
        self._sum.zero_()
        self._sum[:-_SCALARS].view(-1, _COLUMNS).index_copy_(0, self._rows, columns)
        self._sum[-3] = float(trained)
        self._sum[-2] = here.updates
        self._sum[-1] = here.nonfinite
        here.nonfinite.zero_()
        self._work = dist.all_reduce(self._sum, group=self._group, async_op=True)

    def trained(self) -> bool:
        """Whether the latest step trained in any of the processes; waits for the all-reduce."""
        self.settle()
        return bool(self._trained)

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for the all-reduce of the latest step, and update the arrays with it."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        total = self._sum[:-_SCALARS].view(-1, _COLUMNS)
        self._trained.copy_(self._sum[-3] > 0)
        alive = self.countdown != 0
        counted = alive & (total[:, _PARTS] == self._expected)
        sums = total[:, :_PARTS]
        self.sums.copy_(torch.where(counted[:, None], sums, self.sums * alive[:, None]))
        share = (sums[:, COUNT] / self.elements).float()
        mean = self.activity * self.decay + share * (1 - self.decay)
        self.activity.copy_(torch.where(counted, mean, self.activity))
        self.threshold.copy_(torch.where(counted, self._next_threshold(sums, counted), self.threshold))
        self.countdown.copy_(total[:, _COUNTDOWN])
        self.nonfinite.add_(self._sum[-1].long())
        self.pending.copy_(self._sum[-2] > 0)
        channel_moments_(self)

    def _next_threshold(self, sums: Tensor, counted: Tensor) -> Tensor:
        """``tau * rms / norm`` of each row, with the rms of ``|d| * norm`` over the tensor's counted rows."""
        weight_sq = sums[:, WEIGHT_SQ].double()
        parts = torch.stack(
            (sums[:, GRAD_SQ].double() * weight_sq * counted, self.elements.double() * counted), 1
        )
        total, elements = torch.segment_reduce(parts, "sum", offsets=self._offsets, initial=0).unbind(1)
        rms = torch.repeat_interleave((total / elements).sqrt(), self._lengths)
        return torch.where(weight_sq == 0, torch.inf, self.tau * rms / weight_sq.sqrt()).float()


@dataclass(frozen=True, eq=False)
class _Here:
    """The rows of one parameter that this process holds, whole or in part.

    Attributes:
        rows: int64, indices into the arrays of all rows.
        parts: number of parts of each row, over all processes that count.
        first: whether this process has the first part.
        everywhere: whether all processes hold the whole parameter.
    """

    rows: np.ndarray
    parts: int = 1
    first: bool = True
    everywhere: bool = False


def _rows_here(view: RowView, part: Part | None) -> _Here:
    every = np.arange(view.start, view.start + view.rows)
    if part is None or part.dim is None:
        return _Here(every, everywhere=True)
    if part.dim == view.dim:
        return _Here(every[part.start : part.start + part.size])
    # Sharded along another dimension: each process with elements has a part of every row.
    return _Here(every if part.size else every[:0], parts=part.parts, first=part.start == 0)


def _common_group(parts: Sequence[Part | None]) -> Any:
    groups = [part.group for part in parts if part is not None and part.dim is not None]
    if not groups:
        groups = [part.group for part in parts if part is not None]
    ranks = {tuple(dist.get_process_group_ranks(group)) for group in groups}
    if len(ranks) > 1:
        raise ValueError(
            f"model: got parameters sharded over different processes {sorted(ranks)}, expected one device "
            f"mesh"
        )
    return groups[0]
