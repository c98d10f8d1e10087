"""The step in plain torch. This backend is the specification of the other backends.

A backend is a module with the functions :func:`step_` and :func:`channel_moments_` and the two of
:mod:`~sparsekern.kernels.backends.reference.norm_act`. The callers have checked the arguments
(:mod:`sparsekern.kernels.checks`). All tensors of a call are on one device. Parameters, gradients and state
have one floating dtype, and their lists one length. ``rows`` gives the rows of the tensors; it is None
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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsekern.kernels.backends.reference.norm_act import norm_act_backward as norm_act_backward
from sparsekern.kernels.backends.reference.norm_act import norm_act_forward as norm_act_forward
from sparsekern.kernels.options import (
    UNSCALED,
    AdamOptions,
    Lists,
    MaskOptions,
    Options,
    Scaling,
    SgdOptions,
    StatisticsOptions,
)
from sparsekern.kernels.rows import COUNT, DOT, GRAD_SQ, WEIGHT_SQ, ChannelArrays, RowArrays, Rows, RowTable


@torch.no_grad()
def step_(op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling = UNSCALED) -> None:
    """One op over lists of tensors, in place.

    ``SGD`` and ``ADAM`` make one step with penalties, statistics, fade-out and masks of rows. With rate 0 a
    step updates no statistics and no countdowns. ``STATISTICS`` makes only the statistics of a step; it is
    called before the step of an external optimizer. ``MASK`` makes the rest; it is called after that step.

    Args:
        op: ``SGD``, ``ADAM``, ``STATISTICS`` or ``MASK`` of :mod:`sparsekern.kernels.options`.
        lists: the lists of the op, :data:`~sparsekern.kernels.options.LISTS`. All are written, except for
            gradients without ``grad_scale`` and parameters in ``STATISTICS``. The caller zeroes new state,
            because masked rows are not written. ``steps`` are the numbers of earlier steps; they are
            incremented before use.
        options: the options of the op.
        rows: the rows of the parameters; None when no tensor is tracked.
        scaling: with ``grad_scale`` (one float32 element), gradients are divided by it and stored back. When
            ``found_inf`` (likewise) is 1, nothing changes.
    """
    _OPS[op](lists, options, rows, scaling)


State = list[tuple[Tensor, Tensor]]
"""State tensors and their new values."""

Update = Callable[[int, Tensor, Tensor, "_RowStep | None"], tuple[Tensor, State]]
"""Computes the new parameter ``i`` and its new state, from the parameter, the gradient and the rows."""


def _sgd(lists: Lists, options: SgdOptions, rows: Rows | None, scaling: Scaling) -> None:
    buffers, momentum, lr = lists[2], options.momentum, _rate(options.lr)

    def update(i: int, w: Tensor, d: Tensor, row: _RowStep | None) -> tuple[Tensor, State]:
        d = _add_decay(d, w, options.weight_decay, row)
        state: State = []
        if momentum != 0:
            buf = d
            if not options.first:
                buf = _widen(buffers[i]) * _scalar(momentum, w)
                buf = buf + d * _scalar(1 - options.dampening, w)
            d = d + buf * _scalar(momentum, w) if options.nesterov else buf
            state.append((buffers[i], buf))
        return w - d * _scalar(lr, w), state

    _update_all(lists, options, rows, scaling, update)


def _adam(lists: Lists, options: AdamOptions, rows: Rows | None, scaling: Scaling) -> None:
    _, _, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
    beta1, beta2, lr = options.beta1, options.beta2, _rate(options.lr)
    made = None if scaling.found_inf is None else scaling.found_inf.reshape(()) != 1

    def update(i: int, w: Tensor, d: Tensor, row: _RowStep | None) -> tuple[Tensor, State]:
        step = steps[i]
        step += 1 if made is None else made.to(step.dtype)
        if options.decoupled:
            w = _shrink(w, lr, options.weight_decay, row)
        else:
            d = _add_decay(d, w, options.weight_decay, row)
        m = _lerp(_widen(exp_avgs[i]), d, 1 - beta1)
        v = _widen(exp_avg_sqs[i]) * _scalar(beta2, w) + d * _scalar(1 - beta2, w) * d
        state = [(exp_avgs[i], m), (exp_avg_sqs[i], v)]
        top = v
        if options.amsgrad:
            top = torch.maximum(_widen(max_exp_avg_sqs[i]), v)
            state.append((max_exp_avg_sqs[i], top))
        count = step.double()
        step_size = lr / (1 - torch.pow(beta1, count))
        inverse_root = 1 / (1 - torch.pow(beta2, count)).sqrt()
        denominator = _sqrt(top) * _scalar(inverse_root, w) + _scalar(options.eps, w)
        return w - _scalar(step_size, w) * m / denominator, state

    _update_all(lists, options, rows, scaling, update)


def _update_all(
    lists: Lists,
    options: SgdOptions | AdamOptions,
    rows: Rows | None,
    scaling: Scaling,
    update: Update,
) -> None:
    """The part of a step that all optimizers share: gradients, statistics, fade-out, masks, stores."""
    params, grads = lists[:2]
    go, update_statistics = _conditions(options.lr, scaling.found_inf, params)
    grad_scale = None if scaling.grad_scale is None else scaling.grad_scale.clone()
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        row = _rows_of(rows, i, param, update_statistics)
        keep = _and(row.live, go) if row else go
        w = _widen(param)
        d = _gradient(grad, w.dtype, grad_scale, options.maximize, keep)
        if row:
            row.statistics(w, d)
        w, state = update(i, w, d, row)
        _store(param, row.fade(w) if row else w, keep)
        for tensor, value in state:
            _store(tensor, row.clear(value) if row else value, keep)
        if row:
            row.count_down()


def _statistics(lists: Lists, options: StatisticsOptions, rows: Rows | None, scaling: Scaling) -> None:
    """Write ``sums``, ``activity``, ``threshold``, ``nonfinite`` and ``pending`` as a step does."""
    for i, (param, grad) in enumerate(zip(*lists, strict=True)):
        row = _rows_of(rows, i, param, None)
        if row:
            row.statistics(_widen(param), _widen(grad))


def _mask(lists: Lists, options: MaskOptions, rows: Rows | None, scaling: Scaling) -> None:
    """Set masked rows to 0, multiply the others by ``1 - lr * penalty``, and let fading rows fade further."""
    (params,) = lists
    update_statistics = _conditions(options.lr, None, params)[1]
    lr = _rate(options.lr)
    for i, param in enumerate(params):
        row = _rows_of(rows, i, param, update_statistics)
        if row:
            w = _widen(param)
            w = row.fade(_shrink(w, lr, 0.0, row))
            _store(param, torch.where(row.live, w, 0), None)
            row.count_down()


_OPS: tuple[Callable[..., None], ...] = (_sgd, _adam, _statistics, _mask)


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
        fading: bool ``[rows]``; rows that shrink in this step.
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
        self.fading = _and(self.countdown > 0, update_statistics)
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

    def fade(self, w: Tensor) -> Tensor:
        """``w``, times ``(k - 1) / k`` in rows with ``k`` steps left; exactly 0 in the last step."""
        steps = self.countdown.to(w.dtype)
        factor = torch.where(self.fading, (steps - 1) / steps, 1)
        return self.clear(w * self.spread(factor))

    def clear(self, values: Tensor) -> Tensor:
        """``values`` with 0 in the rows whose fade-out ends in this step. These rows become masked."""
        return torch.where(self.ending, 0, values)

    def count_down(self) -> None:
        """Subtract 1 from the countdown of fading rows, in place."""
        self.countdown -= self.fading.to(self.countdown.dtype)


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
    """``value`` rounded to the compute type, as a 0-dim tensor; a number is on the CPU."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.dtype)
    return torch.tensor(value, dtype=like.dtype, device="cpu")


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


def _add_decay(d: Tensor, w: Tensor, weight_decay: float, row: _RowStep | None) -> Tensor:
    """``d + w * (weight_decay + penalty)``, and ``d`` where that factor is 0, even if ``w`` is infinite."""
    if row:
        decay = row.spread((weight_decay + row.penalty).to(w.dtype))
        return torch.where(decay == 0, d, d + w * decay)
    return d if weight_decay == 0 else d + w * _scalar(weight_decay, w)


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
