"""The step in plain torch: the specification that every other backend equals, and itself a backend.

A backend is a module with the five functions below and the two of
:mod:`~sparsekern.kernels.backends.reference.norm_act`, called with arguments that were already checked
(:mod:`sparsekern.kernels.checks`). All tensors of a call lie on one device; ``params``, ``grads`` and the
state lists are as long as each other and of one floating dtype. ``rows`` says which rows the
tensors have; it is None when none of them is tracked. ``rows.table`` may be any object with the
attributes of ``RowArrays``.

Arithmetic. The compute type is float64 for float64 tensors and float32 for all others; 16-bit
tensors are widened at the load and rounded once at the store, and an update reads the unrounded
state. Scalars are formed in float64 and rounded once to the compute type. Every operation written
here is one rounding, in the order written (no fused multiply-add), so a backend may be compared
element by element.

Rows. A row with ``countdown == 0`` is *masked*: nothing of it is read or written, its gradient
included (it was zeroed when the mask was set), and its sums are 0. Rows are taken along a logical
dimension, so memory formats make no difference; the sum over a row may be taken in any order.

Nothing here reads a device value into Python: conditions are tensors.
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
    """One step of SGD with everything that the rows ask for, in place.

    Args:
        momentum_buffers: empty when ``momentum`` is 0. With ``first`` they are set to the gradient
            and their content is not read; they come zeroed, because masked rows are not written.
        lr: a float, or a one-element floating tensor on the device of the parameters.
        grad_scale: one-element float32; gradients are divided by it and stored back.
        found_inf: one-element float32; when it is 1 nothing at all changes.

    When ``lr`` is 0 the rows do not take part: no statistics, no decline.
    """
    go, learn = _conditions(lr, found_inf, params)
    lr = _rate(lr)
    grad_scale = None if grad_scale is None else grad_scale.clone()
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, learn)
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
    """One step of Adam (``decoupled``: AdamW) with everything that the rows ask for, in place.

    Args:
        max_exp_avg_sqs: empty unless ``amsgrad``.
        steps: float32, one element each: steps made so far; incremented here, before they are used.

    The other arguments are as in :func:`sgd_step_`.
    """
    go, learn = _conditions(lr, found_inf, params)
    lr = _rate(lr)
    grad_scale = None if grad_scale is None else grad_scale.clone()
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, learn)
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
    """The statistics of a step alone, before an optimizer that knows nothing of rows makes its own.

    Fills ``sums`` and updates ``activity``, ``threshold``, ``nonfinite`` and ``pending`` as a step
    does; parameters and gradients are only read.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, None)
        if row:
            row.statistics(_widen(param), _widen(grad))


@torch.no_grad()
def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """Penalty, decline and mask alone, after an optimizer that knows nothing of rows made its step.

    Masked rows become 0; the others are multiplied by ``1 - lr * penalty``, and declining ones then
    fall as in a step. With ``lr`` 0 nothing but the mask takes place.
    """
    _, learn = _conditions(lr, None, params)
    lr = _rate(lr)
    for i, param in enumerate(params):
        row = _rows_of(rows, i, param, learn)
        if row:
            w = _widen(param)
            w = row.decline(_shrink(w, lr, 0.0, row))
            _store(param, torch.where(row.live, w, 0), None)
            row.count_down()


@torch.no_grad()
def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """Fold the dots of the last step into the means per channel; once per step, after all lists.

    Per channel, ``x`` is the sum over its gates' rows of ``dot`` (float32, any order), and
    ``channel_dot = decay * channel_dot + (1 - decay) * x``, likewise ``channel_dot_sq`` with
    ``x * x``; ``updates`` rises by 1. The dots and ``pending`` are then set to 0. When ``pending``
    is 0 (no step since, or one that changed nothing) nothing changes.
    """
    learn = table.pending != 0
    dot = table.sums[:, DOT].index_select(0, table.gate_rows)
    x = torch.segment_reduce(dot, "sum", offsets=table.gate_offsets, initial=0)
    _blend(table.channel_dot, x, table.decay, learn)
    _blend(table.channel_dot_sq, x * x, table.decay, learn)
    table.updates.add_(learn)
    table.sums[:, DOT] = 0
    table.pending.zero_()


class _RowStep:
    """The rows of one tensor during one step."""

    def __init__(
        self, table: RowTable | RowArrays, param: Tensor, start: int, dim: int, learn: Tensor | None
    ) -> None:
        self.table = table
        self.dim = dim
        self.rows = param.shape[dim]
        self.size = param.numel() // max(self.rows, 1)
        self.shape = [1] * param.dim()
        self.shape[dim] = self.rows
        self.slice = slice(start, start + self.rows)
        self.learn = learn
        self.penalty = table.penalty[self.slice].double()
        self.elements = table.elements[self.slice]
        self.countdown = table.countdown[self.slice]
        self.alive = self.countdown != 0
        self.live = self.spread(self.alive)
        self.declining = _and(self.countdown > 0, learn)
        self.ending = self.spread(_and(self.countdown == 1, learn))

    def spread(self, values: Tensor) -> Tensor:
        """Per-row values in a shape that broadcasts over the tensor."""
        return values.reshape(self.shape)

    def _fold(self, values: Tensor) -> Tensor:
        return values.movedim(self.dim, 0).reshape(self.rows, self.size).sum(1)

    def statistics(self, w: Tensor, d: Tensor) -> None:
        """Sums, mean activity and next thresholds, from the parameter before its update."""
        table = self.table
        threshold = table.threshold[self.slice]
        exceeds = d.abs() > self.spread(threshold)
        parts = (exceeds.to(w.dtype), w * d, d * d, w * w)
        sums = torch.stack([self._fold(part) for part in parts], 1).float()
        finite = sums.isfinite().all(1)
        counted = self.alive & finite
        sums = torch.where(counted[:, None], sums, 0)
        spoilt = (self.alive & ~finite).sum()
        table.nonfinite.add_(spoilt if self.learn is None else spoilt * self.learn)
        _store(table.sums[self.slice], sums, self.learn)
        counted = _and(counted, self.learn)
        share = sums[:, COUNT] / self.elements
        _blend(table.activity[self.slice], share, table.decay, counted)
        _store(threshold, self._next_threshold(sums, counted), counted)
        _store(table.pending, torch.ones_like(table.pending), self.learn)

    def _next_threshold(self, sums: Tensor, counted: Tensor) -> Tensor:
        """``tau * rms of |d| * norm over the counted rows / norm``, with a row's norm; float64."""
        weight_sq = sums[:, WEIGHT_SQ].double()
        total = (sums[:, GRAD_SQ].double() * weight_sq).sum()
        rms = (total / (counted * self.elements.double()).sum()).sqrt()
        threshold = self.table.tau * rms / weight_sq.sqrt()
        return torch.where(weight_sq == 0, torch.inf, threshold).float()

    def decline(self, w: Tensor) -> Tensor:
        """``w`` times ``(k - 1) / k`` in declining rows; in their last step exactly 0."""
        steps = self.countdown.to(w.dtype)
        factor = torch.where(self.declining, (steps - 1) / steps, 1)
        return self.clear(w * self.spread(factor))

    def clear(self, values: Tensor) -> Tensor:
        """Zero the rows that end their decline in this step: from the next on they are masked."""
        return torch.where(self.ending, 0, values)

    def count_down(self) -> None:
        self.countdown -= self.declining.to(self.countdown.dtype)


def _rows_of(rows: Rows | None, i: int, param: Tensor, learn: Tensor | None) -> _RowStep | None:
    if rows is None or rows.table is None or rows.starts[i] < 0:
        return None
    return _RowStep(rows.table, param, rows.starts[i], rows.dims[i], learn)


def _conditions(
    lr: float | Tensor, found_inf: Tensor | None, params: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Whether anything changes, and whether the rows take part; None stands for certainly."""
    go = None if found_inf is None else found_inf.reshape(()) != 1
    if isinstance(lr, Tensor):
        return go, _and(lr.reshape(()) != 0, go)
    if lr == 0 and params:
        # A tensor although known here: "certainly not" would be a third case everywhere below.
        return go, torch.zeros((), dtype=torch.bool, device=params[0].device)
    return go, go


def _rate(lr: float | Tensor) -> float | Tensor:
    """``lr`` as a float or 0-dim float64, in memory of its own: it is read before anything is written."""
    return lr.reshape(()).to(torch.float64, copy=True) if isinstance(lr, Tensor) else lr


def _and(condition: Tensor, other: Tensor | None) -> Tensor:
    """Both; None stands for certainly."""
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
    target.copy_(value if keep is None else torch.where(keep, value, target))


def _blend(mean: Tensor, value: Tensor, decay: float, keep: Tensor | None) -> None:
    _store(mean, mean * _scalar(decay, mean) + value * _scalar(1 - decay, mean), keep)


def _gradient(
    grad: Tensor, dtype: torch.dtype, grad_scale: Tensor | None, maximize: bool, keep: Tensor | None
) -> Tensor:
    """The unscaled gradient in the compute type; under a scale also stored, with torch's sign."""
    d = grad.to(dtype)
    if grad_scale is not None:
        d = d / _scalar(grad_scale, d)
        _store(grad, d, keep)
    return -d if maximize else d


def _l2(weight_decay: float, row: _RowStep | None, w: Tensor) -> Tensor | None:
    """What times W is added to the gradient: ``weight_decay + penalty``; None for nothing."""
    if row:
        return row.spread((weight_decay + row.penalty).to(w.dtype))
    return None if weight_decay == 0 else _scalar(weight_decay, w)


def _shrink(w: Tensor, lr: float | Tensor, weight_decay: float, row: _RowStep | None) -> Tensor:
    """``w`` times ``1 - lr * (weight_decay + penalty)``."""
    if row:
        return w * row.spread((1 - lr * (weight_decay + row.penalty)).to(w.dtype))
    return w if weight_decay == 0 else w * _scalar(1 - lr * weight_decay, w)


def _sqrt(values: Tensor) -> Tensor:
    """Correctly rounded, which torch's own is not for float32 on a CPU (MKL's is the last bit off)."""
    if values.is_cpu and values.dtype == torch.float32:
        return values.double().sqrt().float()
    return values.sqrt()


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """torch.lerp's two formulas, whose choice keeps both ends exact."""
    if weight < 0.5:
        return start + _scalar(weight, start) * (end - start)
    return end - (end - start) * (1 - _scalar(weight, start))
