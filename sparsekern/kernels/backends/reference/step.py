"""The step in plain torch. This backend is the specification of the other backends.

A backend is a module with the five functions below and the two of
:mod:`~sparsekern.kernels.backends.reference.norm_act`. The callers have checked the arguments
(:mod:`sparsekern.kernels.checks`). All tensors of a call are on one device. ``params``, ``grads`` and the
state lists have the same length and one floating dtype. ``rows`` gives the rows of the tensors; it is None
when no tensor is tracked. ``rows.table`` may be any object with the attributes of ``RowArrays``.

Arithmetic. The compute type is float64 for float64 tensors and float32 for all others; 16-bit
tensors are widened at the load and rounded once at the store, and an update reads the unrounded
state. Scalars are computed in float64 and rounded once to the compute type. Each operation in this file
rounds once, in the order of the code (no fused multiply-add), so backends can be compared element by
element.

Rows. A row with ``countdown == 0`` is *masked*: the step neither reads nor writes its parameter, gradient
and state, and its sums are 0. The parameter and the state were zeroed when the mask was set. Rows run along
a logical dimension, so the memory format makes no difference. The sum over a row may be taken in any order.

No function reads a device value into Python: conditions are tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.kernels.backends.reference.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.reference.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.rows import COUNT, DOT, GRAD_SQ, WEIGHT_SQ, ChannelArrays, RowArrays, Rows, RowTable


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rows: Rows | None,
) -> None:
    """One step of SGD with penalties, statistics, declines and masks of rows, in place.

    When ``lr`` is 0, the step updates no statistics and no countdowns.

    Args:
        params: the parameters. Written.
        grads: their gradients. Written only with ``grad_scale``.
        momentum_buffers: empty when ``momentum`` is 0. With ``first`` they are set to the gradient
            and not read. The caller zeroes new buffers, because masked rows are not written.
        lr: a float, or a one-element floating tensor on the device of the parameters.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        first: the buffers are new.
        grad_scale: one-element float32; gradients are divided by it and stored back.
        found_inf: one-element float32; when it is 1, nothing changes.
        rows: the rows of ``params``; None when no tensor is tracked.
    """
    go, update_statistics = _conditions(lr, found_inf, params)
    lr = _rate(lr)
    grad_scale = None if grad_scale is None else grad_scale.clone()
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, update_statistics)
        keep = _and(row.live, go) if row else go
        w = _widen(param)
        d = _gradient(grad, w.dtype, grad_scale, maximize, keep)
        if row:
            row.statistics(w, d)
        decay = _l2(weight_decay, row, w)
        if decay is not None:
            d = d + w * decay
        buf = None
        if momentum != 0:
            buf = d
            if not first:
                buf = _widen(momentum_buffers[i]) * _scalar(momentum, w)
                buf = buf + d * _scalar(1 - dampening, w)
            d = d + buf * _scalar(momentum, w) if nesterov else buf
        w = w - d * _scalar(lr, w)
        if row:
            w = row.decline(w)
        _store(param, w, keep)
        if buf is not None:
            _store(momentum_buffers[i], row.clear(buf) if row else buf, keep)
        if row:
            row.count_down()


@torch.no_grad()
def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rows: Rows | None,
) -> None:
    """One step of Adam (``decoupled``: AdamW) with penalties, statistics, declines and masks, in place.

    Args:
        exp_avgs, exp_avg_sqs: running means of the gradient and its square. Written.
        max_exp_avg_sqs: empty unless ``amsgrad``. Written.
        steps: float32, one element each; number of earlier steps. Incremented before use.
        beta1, beta2, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.Adam``.
        decoupled: weight decay and penalties shrink the parameter (AdamW), not the gradient.

    The other arguments are as in :func:`sgd_step_`.
    """
    go, update_statistics = _conditions(lr, found_inf, params)
    lr = _rate(lr)
    grad_scale = None if grad_scale is None else grad_scale.clone()
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, update_statistics)
        keep = _and(row.live, go) if row else go
        step = steps[i]
        step += 1 if go is None else go.to(step.dtype)
        w = _widen(param)
        d = _gradient(grad, w.dtype, grad_scale, maximize, keep)
        if row:
            row.statistics(w, d)
        if decoupled:
            w = _shrink(w, lr, weight_decay, row)
        else:
            decay = _l2(weight_decay, row, w)
            d = d if decay is None else d + w * decay
        m = _lerp(_widen(exp_avgs[i]), d, 1 - beta1)
        v = _widen(exp_avg_sqs[i]) * _scalar(beta2, w) + d * _scalar(1 - beta2, w) * d
        top = torch.maximum(_widen(max_exp_avg_sqs[i]), v) if amsgrad else v
        count = step.double()
        step_size = lr / (1 - torch.pow(beta1, count))
        inverse_root = 1 / (1 - torch.pow(beta2, count)).sqrt()
        denominator = _sqrt(top) * _scalar(inverse_root, w) + _scalar(eps, w)
        w = w - _scalar(step_size, w) * m / denominator
        if row:
            w, m, v, top = row.decline(w), row.clear(m), row.clear(v), row.clear(top)
        _store(param, w, keep)
        _store(exp_avgs[i], m, keep)
        _store(exp_avg_sqs[i], v, keep)
        if amsgrad:
            _store(max_exp_avg_sqs[i], top, keep)
        if row:
            row.count_down()


@torch.no_grad()
def row_statistics_(params: Sequence[Tensor], grads: Sequence[Tensor], *, rows: Rows) -> None:
    """Only the statistics of a step; called before the step of an external optimizer.

    The function writes ``sums``, ``activity``, ``threshold``, ``nonfinite`` and ``pending`` as a step does.
    Parameters and gradients are only read.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, None)
        if row:
            row.statistics(_widen(param), _widen(grad))


@torch.no_grad()
def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """Only the penalty, decline and mask of a step; called after the step of an external optimizer.

    Masked rows become 0. The other rows are multiplied by ``1 - lr * penalty``, and declining rows then
    shrink as in a step. With ``lr`` 0 only the mask is applied.
    """
    _, update_statistics = _conditions(lr, None, params)
    lr = _rate(lr)
    for i, param in enumerate(params):
        row = _rows_of(rows, i, param, update_statistics)
        if row:
            w = _widen(param)
            w = row.decline(_shrink(w, lr, 0.0, row))
            _store(param, torch.where(row.live, w, 0), None)
            row.count_down()


@torch.no_grad()
def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """Update the means per channel with the dots of the last step; called once per step, after all lists.

    For each channel, ``x`` is the sum of ``dot`` over the rows of its gates (float32, any order). The update
    is ``channel_dot = decay * channel_dot + (1 - decay) * x``, and likewise ``channel_dot_sq`` with
    ``x * x``. ``updates`` rises by 1. Then the dots and ``pending`` are set to 0. When ``pending`` is 0 (no
    step since the last call, or a skipped step), the means and ``updates`` do not change.
    """
    update_statistics = table.pending != 0
    dot = table.sums[:, DOT].index_select(0, table.gate_rows)
    x = torch.segment_reduce(dot, "sum", offsets=table.gate_offsets, initial=0)
    _blend(table.channel_dot, x, table.decay, update_statistics)
    _blend(table.channel_dot_sq, x * x, table.decay, update_statistics)
    table.updates.add_(update_statistics)
    table.sums[:, DOT] = 0
    table.pending.zero_()


class _RowStep:
    """The rows of one tensor during one step.

    Attributes:
        size: number of elements of a row.
        shape: shape in which per-row values broadcast over the tensor.
        update_statistics: bool ``[]``, whether the step updates statistics and countdowns; None for True.
        alive: bool ``[rows]``; rows that are not masked. ``live`` is the same in ``shape``.
        declining: bool ``[rows]``; rows that shrink in this step.
        ending: bool in ``shape``; rows that become 0 in this step.
    """

    def __init__(
        self,
        table: RowTable | RowArrays,
        param: Tensor,
        start: int,
        dim: int,
        update_statistics: Tensor | None,
    ) -> None:
        self.table = table
        self.dim = dim
        self.rows = param.shape[dim]
        self.size = param.numel() // max(self.rows, 1)
        self.shape = [1] * param.dim()
        self.shape[dim] = self.rows
        self.slice = slice(start, start + self.rows)
        self.update_statistics = update_statistics
        self.penalty = table.penalty[self.slice].double()
        self.elements = table.elements[self.slice]
        self.countdown = table.countdown[self.slice]
        self.alive = self.countdown != 0
        self.live = self.spread(self.alive)
        self.declining = _and(self.countdown > 0, update_statistics)
        self.ending = self.spread(_and(self.countdown == 1, update_statistics))

    def spread(self, values: Tensor) -> Tensor:
        """Per-row values in a shape that broadcasts over the tensor."""
        return values.reshape(self.shape)

    def _fold(self, values: Tensor) -> Tensor:
        """Sum over each row, ``[rows]``."""
        return values.movedim(self.dim, 0).reshape(self.rows, self.size).sum(1)

    def statistics(self, w: Tensor, d: Tensor) -> None:
        """Update sums, activity and thresholds from the parameter before its update and its gradient."""
        table = self.table
        threshold = table.threshold[self.slice]
        exceeds = d.abs() > self.spread(threshold)
        parts = (exceeds.to(w.dtype), w * d, d * d, w * w)
        sums = torch.stack([self._fold(part) for part in parts], 1).float()
        finite = sums.isfinite().all(1)
        counted = self.alive & finite
        sums = torch.where(counted[:, None], sums, 0)
        spoilt = (self.alive & ~finite).sum()
        table.nonfinite.add_(spoilt if self.update_statistics is None else spoilt * self.update_statistics)
        _store(table.sums[self.slice], sums, self.update_statistics)
        counted = _and(counted, self.update_statistics)
        share = sums[:, COUNT] / self.elements
        _blend(table.activity[self.slice], share, table.decay, counted)
        _store(threshold, self._next_threshold(sums, counted), counted)
        _store(table.pending, torch.ones_like(table.pending), self.update_statistics)

    def _next_threshold(self, sums: Tensor, counted: Tensor) -> Tensor:
        """``tau * rms / norm`` of each row; ``rms`` is that of ``|d| * norm`` over the counted rows."""
        weight_sq = sums[:, WEIGHT_SQ].double()
        total = (sums[:, GRAD_SQ].double() * weight_sq).sum()
        rms = (total / (counted * self.elements.double()).sum()).sqrt()
        threshold = self.table.tau * rms / weight_sq.sqrt()
        return torch.where(weight_sq == 0, torch.inf, threshold).float()

    def decline(self, w: Tensor) -> Tensor:
        """``w``, times ``(k - 1) / k`` in rows with ``k`` steps left; exactly 0 in the last step."""
        steps = self.countdown.to(w.dtype)
        factor = torch.where(self.declining, (steps - 1) / steps, 1)
        return self.clear(w * self.spread(factor))

    def clear(self, values: Tensor) -> Tensor:
        """``values`` with 0 in the rows whose decline ends in this step. These rows become masked."""
        return torch.where(self.ending, 0, values)

    def count_down(self) -> None:
        """Subtract 1 from the countdown of declining rows, in place."""
        self.countdown -= self.declining.to(self.countdown.dtype)


def _rows_of(rows: Rows | None, i: int, param: Tensor, update_statistics: Tensor | None) -> _RowStep | None:
    if rows is None or rows.table is None or rows.starts[i] < 0:
        return None
    return _RowStep(rows.table, param, rows.starts[i], rows.dims[i], update_statistics)


def _conditions(
    lr: float | Tensor, found_inf: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Conditions of a step.

    Returns:
        ``(go, update_statistics)``, bool ``[]``: whether the step is made, and whether it updates
        statistics and countdowns. None stands for True.
    """
    go = None if found_inf is None else found_inf.reshape(()) != 1
    if isinstance(lr, Tensor):
        return go, _and(lr.reshape(()) != 0, go)
    if lr == 0 and params:
        # A tensor, although the value is known: a Python False would be a third case for all callers.
        return go, torch.zeros((), dtype=torch.bool, device=params[0].device)
    return go, go


def _rate(lr: float | Tensor) -> float | Tensor:
    """``lr`` as a float or 0-dim float64 tensor. The tensor is a copy, in case the step writes to ``lr``."""
    return lr.reshape(()).to(torch.float64, copy=True) if isinstance(lr, Tensor) else lr


def _and(condition: Tensor, other: Tensor | None) -> Tensor:
    """Both conditions; None stands for True."""
    return condition if other is None else condition & other


def _widen(tensor: Tensor) -> Tensor:
    """``tensor`` in the compute type."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """``value`` rounded to the compute type, as a 0-dim tensor."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.dtype)
    return torch.tensor(value, dtype=like.dtype)


def _store(target: Tensor, value: Tensor, keep: Tensor | None) -> None:
    """Write ``value`` where ``keep`` is True, in place; None stands for True."""
    target.copy_(value if keep is None else torch.where(keep, value, target))


def _blend(mean: Tensor, value: Tensor, decay: float, keep: Tensor | None) -> None:
    """Update an exponential mean where ``keep`` is True, in place."""
    _store(mean, mean * _scalar(decay, mean) + value * _scalar(1 - decay, mean), keep)


def _gradient(
    grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, maximize: bool, keep: Tensor | None
) -> Tensor:
    """The unscaled gradient, negated with ``maximize``. With a scale it is also stored, never negated."""
    d = grad.to(dtype)
    if grad_scale is not None:
        d = d / _scalar(grad_scale, d)
        _store(grad, d, keep)
    return -d if maximize else d


def _l2(weight_decay: float, row: _RowStep | None, w: Tensor) -> Tensor | None:
    """Factor of ``w`` in the gradient: ``weight_decay + penalty``; None for 0 without rows."""
    if row:
        return row.spread((weight_decay + row.penalty).to(w.dtype))
    return None if weight_decay == 0 else _scalar(weight_decay, w)


def _shrink(w: Tensor, lr: float | Tensor, weight_decay: float, row: _RowStep | None) -> Tensor:
    """``w`` times ``1 - lr * (weight_decay + penalty)``."""
    if row:
        return w * row.spread((1 - lr * (weight_decay + row.penalty)).to(w.dtype))
    return w if weight_decay == 0 else w * _scalar(1 - lr * weight_decay, w)


def _sqrt(values: Tensor) -> Tensor:
    """Correctly rounded square root. torch's float32 root on a CPU (from MKL) can be one bit off."""
    if values.is_cpu and values.dtype == torch.float32:
        return values.double().sqrt().float()
    return values.sqrt()


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """``torch.lerp`` with its two formulas: weight 0 gives exactly ``start``, weight 1 exactly ``end``."""
    if weight < 0.5:
        return start + _scalar(weight, start) * (end - start)
    return end - (end - start) * (1 - _scalar(weight, start))
