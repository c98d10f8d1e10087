"""The step ops: functions, schemas and fakes.

The optimizers call the functions in this module. In eager mode a function calls the backend of the device
directly, because the torch dispatcher takes longer than a step over a small list of tensors. Under tracing
(``torch.compile``, ``torch.export``, fake tensors, tensor subclasses) it calls ``torch.ops.sparsekern``.

The ops work in place and return nothing, so the fakes only check the arguments. On both paths the arguments
are checked before data are read or written.
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

# The schemas take the arrays of a RowTable as two lists: arrays that are only read, and arrays that are
# written. Both lists are empty when no tensor of a call is tracked.
_ROW_INPUTS = RowArrays._fields[:2]
_ROW_STATE = RowArrays._fields[2:8]
_ROWS = "Tensor[] row_inputs, Tensor(r!)[] row_state, int[] starts, int[] dims, float tau, float decay) -> ()"
_AMP = "Tensor? grad_scale=None, Tensor? found_inf=None, "


def _operation(schema: str) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """A decorator that registers a function as the op with this schema.

    The decorated function calls the op under tracing, and else the original function directly.
    """
    _LIBRARY.define(schema)

    def register(function: Callable[_P, None]) -> Callable[_P, None]:
        name = function.__name__

        def kernel(*tensors: Any, **options: Any) -> None:
            function(*tensors, **_gathered(options))

        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        # The kernel checks fake tensors like others and then calls a backend that does nothing.
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
    """Whether a call has to use the dispatcher: under tracing, or with a tensor subclass."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


def _flattened(options: dict[str, Any]) -> dict[str, Any]:
    """Options in the types of the schema, which has neither ``Rows`` nor ``float | Tensor``."""
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
    """The inverse of :func:`_flattened`.

    Raises:
        TypeError, ValueError: ``tau`` or ``decay`` is out of range, or the lists of arrays are incomplete.
    """
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
    """One SGD step over a list of tensors, with penalties, statistics, declines and masks of their rows.

    Args:
        params: tensors of any shapes, of one dtype (float32, float64, bfloat16 or float16), on one device.
            Written.
        grads: tensors of the same shapes and dtype, with any strides. Written only with ``grad_scale``.
        momentum_buffers: like ``params``, zeroed when new; empty when ``momentum`` is 0. Written.
        lr: a float or a one-element tensor on the device of ``params``.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        first: whether the buffers are new. New buffers become the gradient, without dampening, as in torch.
        grad_scale: one element; the gradients are divided by it and stored back.
        found_inf: one element; when it is 1, nothing changes.
        rows: the rows of the tensors, or None.

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
        exp_avgs, exp_avg_sqs: like ``params``, zeroed when new. Written.
        max_exp_avg_sqs: like ``params`` with ``amsgrad``, else empty. Written.
        steps: one float32 element per parameter, on the device of ``params`` (without
            ``found_inf`` also on the CPU). Incremented.
        beta1, beta2, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.Adam``.
        decoupled: weight decay and penalties shrink the parameter (AdamW), not the gradient.

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
        # Only the device knows `found_inf`, so the device increments the counter.
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
    """Only the statistics of a step; call it before the step of an external optimizer.

    Args:
        params, grads: as in :func:`sgd_step_`; only read.
        rows: the rows of the tensors.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    lists = {"params": params, "grads": grads}
    _checked_backend(lists, {}, rows, tuple(lists)).row_statistics_(params, grads, rows=rows)


@_operation("row_mask_(Tensor(a!)[] params, *, float lr, Tensor? tensor_lr=None, " + _ROWS)
def row_mask_(params: Sequence[Tensor], *, lr: float | Tensor, rows: Rows) -> None:
    """Only the penalty, decline and mask of a step; call it after the step of an external optimizer.

    Masked rows become 0. The other rows are multiplied by ``1 - lr * penalty``, and declining rows shrink
    by one step of their countdown. With ``lr`` 0 only the mask is applied.

    Args:
        params: as in :func:`sgd_step_`. Written.
        lr: learning rate of that step; a float or a one-element tensor on the device of ``params``.
        rows: the rows of the tensors.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    _checked_backend({"params": params}, {"lr": lr}, rows, ()).row_mask_(params, lr=lr, rows=rows)


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """Update the means per channel with the dots of a step; call it after the last list of that step.

    The means stay as they are when no step since the last call updated the statistics (``found_inf`` 1 or
    ``lr`` 0).

    Raises:
        ValueError: an array has another dtype, shape or device, or (on the CPU) a gate is not a row of
            the table; nothing has changed then.
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
    """The op of :func:`channel_moments_`, with the fields of ChannelArrays as two lists."""
    _checks.count("gates", gates, ChannelArrays._fields[:2])
    _checks.count("state", state, ChannelArrays._fields[2:-1])
    _fold(ChannelArrays._make([*gates, *state, decay]))


def _fold(table: RowTable | ChannelArrays) -> None:
    """Check the arrays and call the backend, except for fake tensors."""
    device = table.sums.device
    backend = choose(device)
    if not 0 <= table.decay < 1:
        _checks.number("decay", table.decay, 0, 1, open_high=True)
    # Native code for the CPU checks the arrays when it reads their addresses.
    if not backend.CHECKS_MEMORY or type(table.sums) is FakeTensor:
        _checks.channels(table)
    if type(table.sums) is not FakeTensor:
        backend.channel_moments_(table)


class _Nothing:
    """The backend for fake tensors and empty lists. Each of its functions does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


_NOTHING: Any = _Nothing()


def _read_lists(grad_scale: Tensor | None) -> tuple[str, ...]:
    """Names of the lists that a step only reads."""
    return ("grads",) if grad_scale is None else ()


def _checked_backend(
    lists: Mapping[str, Sequence[Tensor]],
    scalars: Mapping[str, float | Tensor | None],
    rows: Rows | None,
    read: tuple[str, ...],
) -> Any:
    """The backend of a call, after the checks that the backend does not make.

    Args:
        lists: the lists of tensors, ``params`` among them, keyed by the name of the argument.
        scalars: numbers and one-element tensors, likewise.
        rows: the rows of ``params``.
        read: names of the lists that the call only reads.

    Raises:
        TypeError, ValueError: an argument does not match.
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
    # Checking each tensor in Python takes longer than the step of a small network. The other backends
    # check the tensors when they read the addresses.
    if is_fake or backend is reference:
        _checks.tensors(lists, rows, read)
    return backend
