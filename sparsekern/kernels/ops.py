"""The step ops: the front function, schemas and fakes.

The optimizers call :func:`step_`. In eager mode it calls the backend of the device directly, because the
torch dispatcher takes longer than a step over a small list of tensors. Under tracing (``torch.compile``,
``torch.export``, fake tensors, tensor subclasses) it calls ``torch.ops.sparsekern``.

The ops work in place and return nothing, so the fakes only check the arguments. On both paths the arguments
are checked before data are read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from sparsekern.kernels import checks as _checks
from sparsekern.kernels.backends import choose, reference
from sparsekern.kernels.options import (
    ADAM,
    FIELDS,
    LISTS,
    MASK,
    NAMES,
    OPTIONAL,
    OPTIONS,
    SGD,
    STATISTICS,
    STEPS,
    UNSCALED,
    Lists,
    Options,
    Scaling,
    named,
    read_lists,
)
from sparsekern.kernels.rows import (
    CHANNEL_ARRAYS,
    ROW_INPUTS,
    ROW_STATE,
    ChannelArrays,
    RowArrays,
    Rows,
    RowTable,
)

_LIBRARY = torch.library.Library("sparsekern", "DEF")

# The schemas take the arrays of a RowTable as two lists: arrays that are only read, and arrays that are
# written. Both lists are empty when no tensor of a call is tracked.
_ROWS = "Tensor[] row_inputs, Tensor(r!)[] row_state, int[] starts, int[] dims, float tau, float decay"
_SCALARS = {"grad_scale": "Tensor? grad_scale=None", "found_inf": "Tensor? found_inf=None"}
_TYPES = {"float": "float {0}", "bool": "bool {0}", "float | Tensor": "float {0}, Tensor? tensor_{0}=None"}


def _schema(op: int) -> str:
    """The schema of an op, from its lists and the fields of its options."""
    read = LISTS[STATISTICS] if op == STATISTICS else ()
    lists = [
        f"Tensor[] {name}" if name in read else f"Tensor({chr(ord('a') + i)}!)[] {name}"
        for i, name in enumerate(LISTS[op])
    ]
    options = [_TYPES[type_].format(name) for name, type_ in FIELDS[op].items()]
    scalars = _SCALARS.values() if op in (SGD, ADAM) else ()
    return f"{NAMES[op]}({', '.join([*lists, '*', *options, *scalars, _ROWS])}) -> ()"


def _register(schema: str, kernel: Callable[..., None]) -> Any:
    """Register an op, and return it. ``kernel`` checks fake tensors too, and does nothing else with them."""
    # A graph that the compiler captures would keep the tables of addresses that a plan has made. Users
    # capture steps with `Pruner.capturing`.
    _LIBRARY.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", kernel, lib=_LIBRARY)
    return getattr(torch.ops.sparsekern, name).default


def traced(tensor: Tensor) -> bool:
    """Whether a call has to use the dispatcher: under tracing, or with a tensor subclass."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


def step_(op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling = UNSCALED) -> None:
    """One op over lists of tensors, in place: a step, or the part of a step that concerns rows.

    Args:
        op: number of the op: ``SGD``, ``ADAM``, ``STATISTICS`` or ``MASK``.
        lists: the lists of the op by position, :data:`~sparsekern.kernels.options.LISTS`. ``params`` have any
            shapes, one dtype (float32, float64, bfloat16 or float16) and one device. ``grads`` have the same
            shapes and dtype, and any strides; only ``grad_scale`` makes the op write them. State is like
            ``params``, and zeroed when new. ``steps`` are one float32 element per parameter, on the device of
            ``params`` (without ``found_inf`` also on the CPU). A list that the options do not use is empty.
        options: the options of the op, an object of :data:`~sparsekern.kernels.options.OPTIONS`.
        rows: the rows of the parameters, or None.
        scaling: the gradients are divided by ``grad_scale`` and stored back. When ``found_inf`` is 1, nothing
            changes.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    if lists[0] and traced(lists[0][0]):
        _OPERATORS[op](*lists, **_flattened(op, options, rows, scaling))
    else:
        backend = _checked_backend(op, lists, options, rows, scaling)
        backend.step_(op, lists, options, rows, scaling)


def _flattened(op: int, options: Options, rows: Rows | None, scaling: Scaling) -> dict[str, Any]:
    """Keyword arguments of an op, in the types of its schema."""
    flat: dict[str, Any] = {}
    for name in FIELDS[op]:
        value = getattr(options, name)
        flat |= {name: 0.0, f"tensor_{name}": value} if isinstance(value, Tensor) else {name: value}
    if op in (SGD, ADAM):
        flat |= scaling._asdict()
    if rows is None or rows.table is None:
        nothing: list[Any] = []
        flat |= dict.fromkeys(("row_inputs", "row_state", "starts", "dims"), nothing)
        return flat | {"tau": 1.0, "decay": 0.0}
    table = rows.table
    flat["row_inputs"] = [getattr(table, name) for name in ROW_INPUTS]
    flat["row_state"] = [getattr(table, name) for name in ROW_STATE]
    return flat | {"starts": rows.starts, "dims": rows.dims, "tau": table.tau, "decay": table.decay}


def _gathered(op: int, flat: dict[str, Any]) -> tuple[Options, Rows | None, Scaling]:
    """The inverse of :func:`_flattened`.

    Raises:
        TypeError, ValueError: a number is out of range, or the lists of arrays are incomplete.
    """
    given = dict(flat)
    values = {name: given.pop(name) for name in FIELDS[op]}
    for name in values:
        tensor = given.pop(f"tensor_{name}", None)
        values[name] = values[name] if tensor is None else tensor
    options = OPTIONS[op](**values)
    tau, decay, starts, dims = (given[name] for name in ("tau", "decay", "starts", "dims"))
    _checks.means(tau, decay)
    arrays, rows = [*given["row_inputs"], *given["row_state"]], None
    if arrays:
        _checks.count("row_inputs", given["row_inputs"], ROW_INPUTS)
        _checks.count("row_state", given["row_state"], ROW_STATE)
        rows = Rows(RowArrays._make([*arrays, tau, decay]), starts, dims)
    else:
        _checks.empty("starts", starts, "row_inputs and row_state are given")
        _checks.empty("dims", dims, "row_inputs and row_state are given")
    return options, rows, Scaling(given.get("grad_scale"), given.get("found_inf"))


def _kernel(op: int) -> Callable[..., None]:
    """The function behind ``torch.ops.sparsekern``."""

    def kernel(*lists: Sequence[Tensor], **flat: Any) -> None:
        arguments = _gathered(op, flat)
        _checked_backend(op, lists, *arguments).step_(op, lists, *arguments)

    return kernel


_OPERATORS = tuple(_register(_schema(op), _kernel(op)) for op in (SGD, ADAM, STATISTICS, MASK))


def channel_moments_(table: RowTable | ChannelArrays) -> None:
    """Update the means per channel with the dots of a step; call it after the last list of that step.

    The means stay as they are when no step since the last call updated the statistics (``found_inf`` 1 or
    ``lr`` 0).

    Raises:
        ValueError: an array has another dtype, shape or device, or (on the CPU) a gate is not a row of
            the table; nothing has changed then.
    """
    if traced(table.sums):
        arrays = [getattr(table, name) for name in CHANNEL_ARRAYS]
        _CHANNEL_MOMENTS(arrays[:2], arrays[2:], decay=table.decay)
    else:
        _fold(table)


def _channel_moments_kernel(gates: Sequence[Tensor], state: Sequence[Tensor], *, decay: float) -> None:
    """The op of :func:`channel_moments_`, with the fields of ChannelArrays as two lists."""
    _checks.count("gates", gates, CHANNEL_ARRAYS[:2])
    _checks.count("state", state, CHANNEL_ARRAYS[2:])
    _fold(ChannelArrays._make([*gates, *state, decay]))


_CHANNEL_MOMENTS = _register(
    "_channel_moments_(Tensor[] gates, Tensor(a!)[] state, *, float decay) -> ()", _channel_moments_kernel
)


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


def _checked_backend(op: int, lists: Lists, options: Options, rows: Rows | None, scaling: Scaling) -> Any:
    """The backend of a call, after the checks that the backend does not make; arguments as of :func:`step_`.

    Raises:
        TypeError, ValueError: an argument does not match.
    """
    params, (grad_scale, found_inf) = lists[0], scaling
    _check_lengths(op, lists, options, rows)
    if not params:
        return _NOTHING
    device = params[0].device
    if isinstance(options.lr, Tensor):
        _checks.rate(options.lr, device)
    if grad_scale is not None:
        _checks.scalar("grad_scale", grad_scale, device)
    if found_inf is not None:
        _checks.scalar("found_inf", found_inf, device)
        if op == ADAM:
            # Only the device knows `found_inf`, so the device increments the counter.
            _checks.scalar("steps[0]", lists[STEPS][0], device)
    is_fake = type(params[0]) is FakeTensor
    backend = _NOTHING if is_fake else choose(device)
    # Checking each tensor in Python takes longer than the step of a small network. The other backends
    # check the tensors when they read the addresses.
    if is_fake or backend is reference:
        used = {
            name: tensors for name, tensors in named(op, lists).items() if tensors or name not in OPTIONAL
        }
        _checks.tensors(used, rows, read_lists(op, grad_scale is not None))
    return backend


def _check_lengths(op: int, lists: Lists, options: Options, rows: Rows | None) -> None:
    """Check that each list has one entry per parameter, or none if the options do not use it.

    Raises:
        ValueError: a list has another number of entries.
    """
    count = len(lists[0])
    expected = [count] * len(lists)
    for position, option in _OPTIONAL_AT[op]:
        if not getattr(options, option):
            expected[position] = 0
    if list(map(len, lists)) != expected:
        for name, tensors, length in zip(LISTS[op], lists, expected, strict=True):
            if length != count:
                _checks.empty(name, tensors, OPTIONAL[name][1])
            _checks.lengths(lists[0][:length], {name: tensors}, None)
    if rows is not None and rows.table is not None and not len(rows.starts) == len(rows.dims) == count:
        _checks.lengths(lists[0], {}, rows)


# Position and option of each list that is empty unless the option is set.
_OPTIONAL_AT = tuple(
    [(position, OPTIONAL[name][0]) for position, name in enumerate(names) if name in OPTIONAL]
    for names in LISTS
)
