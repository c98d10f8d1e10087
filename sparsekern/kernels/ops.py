"""Every operation of the package: its function, its schema and its fake, side by side.

The functions below are what the optimizers call. In eager mode they go straight to the backend of
the device, because a pass through the dispatcher costs more than a small list of tensors takes;
where something traces (``torch.compile``, ``torch.export``, fake tensors, tensor subclasses) they
go through ``torch.ops.sparsekern``.

Everything is in place and nothing is returned, so the fakes have nothing to say about shapes. Whichever way
leads to an op, its arguments are checked before anything is read or written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from sparsekern.kernels import checks as _checks
from sparsekern.kernels.backends import choose, reference
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable

_LIBRARY = torch.library.Library("sparsekern", "DEF")

_P = ParamSpec("_P")

# The arrays of a RowTable travel as two lists, both empty when no tensor of a call is tracked:
# those only read and those written.
_ROW_INPUTS = RowArrays._fields[:2]
_ROW_STATE = RowArrays._fields[2:8]
_ROWS = "Tensor[] row_inputs, Tensor(r!)[] row_state, int[] starts, int[] dims, float tau, float decay) -> ()"
_AMP = "Tensor? grad_scale=None, Tensor? found_inf=None, "


def _operation(schema: str) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Register a function as the op of that schema; what comes back picks the shorter way to it."""
    _LIBRARY.define(schema)

    def register(function: Callable[_P, None]) -> Callable[_P, None]:
        name = function.__name__

        def kernel(*tensors: Any, **options: Any) -> None:
            function(*tensors, **_gathered(options))

        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        # Fake tensors are checked as others are, and then nothing is done.
        torch.library.register_fake(f"sparsekern::{name}", kernel, lib=_LIBRARY)
        operator = getattr(torch.ops.sparsekern, name).default

        @functools.wraps(function)
        def front(*tensors: Any, **options: Any) -> None:
            if tensors[0] and traced(tensors[0][0]):
                operator(*tensors, **_flattened(options))
            else:
                function(*tensors, **options)

        return front

    return register


def traced(tensor: Tensor) -> bool:
    """Whether a call has to take the dispatcher: something traces, or this is no plain tensor."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


def _flattened(options: dict[str, Any]) -> dict[str, Any]:
    """Options in the terms of the schema, which knows neither Rows nor a number or tensor."""
    flat = dict(options)
    if isinstance(flat.get("lr"), Tensor):
        flat |= {"lr": 0.0, "tensor_lr": flat["lr"]}
    if "rows" not in flat:
        return flat
    rows = flat.pop("rows")
    if rows is None or rows.table is None:
        nothing: list[Any] = []
        flat |= dict.fromkeys(("row_inputs", "row_state", "starts", "dims"), nothing)
        return flat | {"tau": 1.0, "decay": 0.0}
    table = rows.table
    flat["row_inputs"] = [getattr(table, name) for name in _ROW_INPUTS]
    flat["row_state"] = [getattr(table, name) for name in _ROW_STATE]
    return flat | {
        "starts": rows.starts,
        "dims": rows.dims,
        "tau": table.tau,
        "decay": table.decay,
    }


def _gathered(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_flattened`."""
    options = dict(flat)
    lr = options.pop("tensor_lr", None)
    if lr is not None:
        options["lr"] = lr
    if "row_inputs" not in options:
        return options
    given = {name: options.pop(name) for name in ("row_inputs", "row_state", "starts", "dims")}
    tau, decay = options.pop("tau"), options.pop("decay")
    _checks.means(tau, decay)
    arrays = [*given["row_inputs"], *given["row_state"]]
    if arrays:
        _checks.count("row_inputs", given["row_inputs"], _ROW_INPUTS)
        _checks.count("row_state", given["row_state"], _ROW_STATE)
        options["rows"] = Rows(RowArrays._make([*arrays, tau, decay]), given["starts"], given["dims"])
        return options
    for name in ("starts", "dims"):
        _checks.empty(name, given[name], "row_inputs and row_state are given")
    return options | {"rows": None}


@_operation(
    "sgd_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
    "float lr, Tensor? tensor_lr=None, float momentum, float dampening, float weight_decay, "
    "bool nesterov, bool maximize, bool first, " + _AMP + _ROWS
)
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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rows: Rows | None,
) -> None:
    """One SGD step over a list of tensors, with everything their rows ask for.

    Args:
        params: any shapes, one of float32, float64, bfloat16, float16, one device. Written.
        grads: of the same shapes and dtype, any strides. Written only under ``grad_scale``.
        momentum_buffers: like ``params``, zeroed when new; empty when ``momentum`` is 0.
        lr: a float or a one-element tensor on the device of ``params``.
        first: the buffers are new: they become the gradient (torch applies no dampening then).
        grad_scale: one element; the gradients are divided by it and stored back.
        found_inf: one element; when it is 1 nothing changes.
        rows: which rows the tensors have, or None.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    _checks.finite(momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    lists = {"params": params, "grads": grads, "momentum_buffers": momentum_buffers}
    if momentum == 0:
        _checks.empty("momentum_buffers", lists.pop("momentum_buffers"), "momentum is not 0")
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    _checked_backend(lists, scalars, rows, _read_lists(grad_scale)).sgd_step_(
        params,
        grads,
        momentum_buffers,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        first=first,
        grad_scale=grad_scale,
        found_inf=found_inf,
        rows=rows,
    )


@_operation(
    "adam_step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, *, "
    "float lr, Tensor? tensor_lr=None, float beta1, float beta2, float eps, float weight_decay, "
    "bool decoupled, bool amsgrad, bool maximize, " + _AMP + _ROWS
)
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
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rows: Rows | None,
) -> None:
    """One Adam (``decoupled``: AdamW) step over a list of tensors, as :func:`sgd_step_`.

    Args:
        exp_avgs, exp_avg_sqs: like ``params``, zeroed when new.
        max_exp_avg_sqs: like ``params`` with ``amsgrad``, else empty.
        steps: one float32 element per parameter, on the device of ``params`` (without
            ``found_inf`` also on the CPU); incremented.

    The other arguments and the errors are those of :func:`sgd_step_`.
    """
    _checks.finite(weight_decay=weight_decay)
    _checks.adam(beta1, beta2, eps)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if amsgrad:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    else:
        _checks.empty("max_exp_avg_sqs", max_exp_avg_sqs, "amsgrad is set")
    lists["steps"] = steps
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    if found_inf is not None and params and steps:
        # A step that is not made is not counted, and only the device knows of it.
        scalars["steps[0]"] = steps[0]
    _checked_backend(lists, scalars, rows, _read_lists(grad_scale)).adam_step_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        amsgrad=amsgrad,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        rows=rows,
    )


@_operation("row_statistics_(Tensor[] params, Tensor[] grads, *, " + _ROWS)
def row_statistics_(params: Sequence[Tensor], grads: Sequence[Tensor], *, rows: Rows) -> None:
    """The statistics of a step alone, to be called before another optimizer's step.

    Args:
        params, grads: as in :func:`sgd_step_`; only read.
        rows: which rows the tensors have.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    lists = {"params": params, "grads": grads}
    _checked_backend(lists, {}, rows, tuple(lists)).row_statistics_(params, grads, rows=rows)


@_operation("row_mask_(Tensor(a!)[] params, *, float lr, Tensor? tensor_lr=None, " + _ROWS)
def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """Penalty, decline and mask alone, to be called after another optimizer's step.

    Masked rows become 0; the others are multiplied by ``1 - lr * penalty``, and declining ones fall
    on by one step of their countdown. With ``lr`` 0 only the mask is set.

    Args:
        params: as in :func:`sgd_step_`. Written.
        lr: of that step; a float or a one-element tensor on the device of ``params``.
        rows: which rows the tensors have.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    _checked_backend({"params": params}, {"lr": lr}, rows, ()).row_mask_(params, lr=lr, rows=rows)


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """Fold the dots of a step into the means per channel, after the last list of that step.

    Does nothing when no step since the last call changed anything (``found_inf``, ``lr`` 0).

    Raises:
        ValueError: an array has another type, size or device, or (on the CPU) a gate is no row of the
            table; nothing has changed then.
    """
    if traced(table.sums):
        arrays = [getattr(table, name) for name in ChannelArrays._fields[:-1]]
        _channel_moments_(arrays[:2], arrays[2:], decay=table.decay)
    else:
        _fold(table)


@_operation(
    "_channel_moments_(Tensor[] gates, Tensor(a!)[] state, *, float decay) -> ()",
)
def _channel_moments_(gates: Sequence[Tensor], state: Sequence[Tensor], *, decay: float) -> None:
    """:func:`channel_moments_` with the fields of ChannelArrays, as the dispatcher takes them."""
    _checks.count("gates", gates, ChannelArrays._fields[:2])
    _checks.count("state", state, ChannelArrays._fields[2:-1])
    _fold(ChannelArrays._make([*gates, *state, decay]))


def _fold(table: RowTable | ChannelArrays) -> None:
    device = table.sums.device
    backend = choose(device)
    if not 0 <= table.decay < 1:
        _checks.number("decay", table.decay, 0, 1, open_high=True)
    # Native code for the CPU compares the arrays where it reads their addresses.
    if not getattr(backend, "CHECKS_MEMORY", False) or type(table.sums) is FakeTensor:
        _checks.channels(table)
    if type(table.sums) is not FakeTensor:
        backend.channel_moments_(table)


class _Nothing:
    """The backend of fake tensors and of empty lists."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


_NOTHING: Any = _Nothing()


def _read_lists(grad_scale: Tensor | None) -> tuple[str, ...]:
    """Names of the lists that a step does not write to."""
    return ("grads",) if grad_scale is None else ()


def _checked_backend(
    lists: Mapping[str, Sequence[Tensor]],
    scalars: Mapping[str, float | Tensor | None],
    rows: Rows | None,
    read: tuple[str, ...],
) -> Any:
    """The backend for a call, after the checks that it does not make itself.

    Args:
        lists: by the name of the argument, ``params`` among them.
        scalars: likewise.
        rows: of ``params``.
        read: the lists that the call does not write to.
    """
    params = lists["params"]
    _checks.lengths(params, lists, rows)
    if not params:
        return _NOTHING
    device = params[0].device
    for name, value in scalars.items():
        _checks.scalar(name, value, device)
    _checks.rate(scalars.get("lr"))
    is_fake = type(params[0]) is FakeTensor
    backend = _NOTHING if is_fake else choose(device)
    # To look at every tensor in Python takes longer than the step of a small network. Native
    # backends do it where they read the addresses.
    if is_fake or backend is reference:
        _checks.tensors(lists, rows, read)
    return backend
