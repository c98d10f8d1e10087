"""Checks of arguments, for all packages.

Each check raises one exception with the name of the argument, the actual value and the expected value. Checks
change nothing and read no value from a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsekern.kernels import memory as _memory
from sparsekern.kernels.memory import describe, kind_of
from sparsekern.kernels.rows import (
    ROW_ARRAYS,
    ROW_INPUTS,
    ChannelArrays,
    RowArrays,
    Rows,
    RowTable,
    check_gates,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of parameters that the backends take."""

_INF = float("inf")


def number(
    name: str,
    value: object,
    low: float = -float("inf"),
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Check that ``value`` is a number in an interval, and return it as a float.

    Args:
        name: name of the argument, for messages.
        low, high: ends of the interval.
        open_low, open_high: whether the interval excludes that end.

    Raises:
        TypeError: ``value`` is no int or float.
        ValueError: ``value`` is NaN or outside of the interval.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}: got {value!r}, expected a number in {interval}")
    return float(value)


def lengths(params: Sequence[Tensor], lists: Mapping[str, Sequence[object]], rows: Rows | None) -> None:
    """Check that each list has one entry per parameter.

    Args:
        lists: the lists, keyed by the name of the argument.
        rows: the rows of ``params``.

    Raises:
        ValueError: a list has another number of entries.
    """
    if rows is not None and rows.table is not None:
        lists = {**lists, "rows.starts": rows.starts, "rows.dims": rows.dims}
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name}: got {len(values)} entries, expected {len(params)} as params")


def tensors(lists: Mapping[str, Sequence[Tensor]], rows: Rows | None, read: Sequence[str]) -> None:
    """Check that the tensors of one call match each other and their rows, and have their own memory.

    Args:
        lists: the lists, keyed by the name of the argument. ``params`` has at least one tensor. ``steps`` has
            float32 counters of one element; all other lists match ``params``. A list may be empty.
        rows: the rows of ``params``.
        read: names of the lists that the call only reads.

    Raises:
        TypeError: a tensor has a dtype or layout that no backend takes.
        ValueError: a list has another length, a tensor does not match, or written memory is shared.
    """
    params = lists["params"]
    parameters(params)
    for name, values in lists.items():
        if name == "steps":
            counters(values, params)
        elif name != "params" and values:
            like(name, values, params)
    inside(rows, params)
    written = {name: values for name, values in lists.items() if name not in read}
    others = {name: lists[name] for name in read}
    if rows is not None and rows.table is not None:
        for name in ROW_ARRAYS:
            side = others if name in ROW_INPUTS else written
            side[f"rows.table.{name}"] = [getattr(rows.table, name)]
    _written(written, others)


def _written(written: Mapping[str, Sequence[Tensor]], read: Mapping[str, Sequence[Tensor]]) -> None:
    """Check that the written tensors can be written and share memory with no other tensor.

    Args:
        written, read: tensors that the call writes or only reads, keyed by the name of the argument.

    Raises:
        ValueError: a written tensor cannot be written, or shares memory.
    """
    for name, values in written.items():
        for i, value in enumerate(values):
            own_memory(f"{name}[{i}]" if len(values) > 1 or "." not in name else name, value)
    _memory.check_disjoint(written, read)


def parameters(params: Sequence[Tensor]) -> None:
    """Check that the parameters (at least one) are dense and have one supported dtype and one device.

    Raises:
        TypeError: a parameter has a dtype or layout that no backend takes.
        ValueError: the parameters have several devices or dtypes, or a storage is too small.
    """
    dtype, device = params[0].dtype, params[0].device
    _dense("params[0]", params[0])
    if dtype not in DTYPES:
        raise TypeError(f"params[0]: got {dtype} on {device}, expected float32, float64, bfloat16 or float16")
    for i, param in enumerate(params):
        if param.dtype is not dtype or param.device != device:
            raise ValueError(f"params[{i}]: got {describe(param)}, expected {dtype} on {device} as params[0]")
        _dense(f"params[{i}]", param)


def like(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Check that tensor ``i`` is dense and has the shape, dtype and device of parameter ``i``.

    Raises:
        TypeError: a tensor is not dense.
        ValueError: the number of tensors differs, or a tensor does not match.
    """
    lengths(params, {name: tensors}, None)
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        _dense(f"{name}[{i}]", tensor)
        if kind_of(tensor) != kind_of(param):
            raise ValueError(
                f"{name}[{i}]: got {describe(tensor)}, expected {describe(param)} as params[{i}]"
            )


def own_memory(name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` can be written: each element has its own memory.

    Raises:
        ValueError: elements share memory (expanded tensor), or a tensor of inference mode is used outside.
    """
    if _memory.repeats(tensor):
        raise ValueError(
            f"{name}: got strides {list(tensor.stride())}, expected memory for each element (clone it)"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: got a tensor made in inference mode, expected one that may be written to (clone it)"
        )


def count(name: str, tensors: Sequence[Tensor], fields: Sequence[str]) -> None:
    """Check that there is one tensor per field.

    Raises:
        ValueError: the number of tensors differs.
    """
    if len(tensors) != len(fields):
        raise ValueError(
            f"{name}: got {len(tensors)} tensors, expected {len(fields)} or none ({', '.join(fields)})"
        )


def empty(name: str, tensors: Sequence[Tensor], unless: str) -> None:
    """Check that a list is empty, because an option makes it unused.

    Args:
        unless: the condition under which the list is used, for messages.

    Raises:
        ValueError: the list is not empty.
    """
    if tensors:
        raise ValueError(f"{name}: got {len(tensors)} entries, expected none unless {unless}")


def scalar(name: str, value: object, device: torch.device) -> None:
    """Check a scalar. A tensor needs one floating-point element and has to be on ``device``.

    Raises:
        ValueError: ``value`` is another tensor.
    """
    if not isinstance(value, Tensor):
        return
    is_plain = value.layout is torch.strided and value.dtype in DTYPES and not value.is_neg()
    if value.numel() != 1 or not is_plain or value.device != device:
        raise ValueError(f"{name}: got {describe(value)}, expected one floating-point element on {device}")
    whole(name, value)


def rate(lr: Tensor, device: torch.device) -> None:
    """Check a learning rate that is a tensor. One on a GPU is not read, because the host would wait.

    Raises:
        ValueError: ``lr`` is not one floating-point element on ``device``, or is not finite.
    """
    scalar("lr", lr, device)
    if lr.device.type == "cpu" and type(lr) is not FakeTensor:
        finite("lr", float(lr))


def finite(name: str, value: float) -> None:
    """Check that ``value`` is a finite number.

    Raises:
        TypeError: ``value`` is no number.
        ValueError: ``value`` is NaN or infinite.
    """
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number")
    if not -_INF < value < _INF:
        raise ValueError(f"{name}: got {value!r}, expected a finite number")


def adam(beta1: float, beta2: float, eps: float) -> None:
    """Check that both betas of Adam are in [0, 1) and ``eps`` is finite and at least 0.

    Raises:
        TypeError, ValueError: a number is not in its interval.
    """
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= eps < _INF):
        number("beta1", beta1, 0, 1, open_high=True)
        number("beta2", beta2, 0, 1, open_high=True)
        number("eps", eps, 0, _INF, open_high=True)


def means(tau: float, decay: float) -> None:
    """Check that ``tau`` is finite and above 0, and ``decay`` is in [0, 1).

    Raises:
        TypeError, ValueError: a number is not in its interval.
    """
    if not 0 < tau < _INF:
        number("tau", tau, 0, _INF, open_low=True, open_high=True)
    if not 0 <= decay < 1:
        number("decay", decay, 0, 1, open_high=True)


def counters(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Check the step counters: one float32 element per parameter, on its device or on the CPU.

    Raises:
        TypeError: a counter is not dense.
        ValueError: the number of counters, or the size, dtype or device of a counter differs.
    """
    if len(steps) != len(params):
        raise ValueError(f"steps: got {len(steps)} entries, expected {len(params)} as params")
    for i, (value, param) in enumerate(zip(steps, params, strict=True)):
        _dense(f"steps[{i}]", value)
        fits = value.numel() == 1 and value.dtype is torch.float32
        if not fits or value.device not in (param.device, torch.device("cpu")):
            raise ValueError(
                f"steps[{i}]: got {describe(value)}, expected one float32 element on "
                f"{param.device} or the CPU"
            )


def inside(rows: Rows | None, params: Sequence[Tensor]) -> None:
    """Check that the rows of each tracked parameter are inside of the table and belong to it alone.

    The table has to be valid and on the device of the parameters.

    Raises:
        ValueError: rows are outside of the table or belong to two parameters, or the table is not valid.
    """
    if rows is None or rows.table is None:
        return
    total, device = rows.table.penalty.numel(), rows.table.penalty.device
    if device != params[0].device:
        raise ValueError(
            f"rows.table: got arrays on {device}, expected them on {params[0].device} as params "
            f"(make the table after the model was moved)"
        )
    _row_arrays(rows.table)
    means(rows.table.tau, rows.table.decay)
    lengths(params, {}, rows)
    spans: list[tuple[int, int, int]] = []
    for i, (param, start, dim) in enumerate(zip(params, rows.starts, rows.dims, strict=True)):
        if start < 0:
            continue
        if not (0 <= dim < param.dim() and start + param.shape[dim] <= total):
            raise ValueError(
                f"rows: got start {start} and dimension {dim} for params[{i}] of shape "
                f"{list(param.shape)}, expected rows inside the table's {total}"
            )
        spans.append((start, start + param.shape[dim], i))
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"rows: got row {start} for params[{one}] and params[{other}], expected rows of their own"
            )


def _row_arrays(table: RowTable | RowArrays) -> None:
    """Check the dtypes and shapes of the arrays of a table, and that they are contiguous.

    Raises:
        ValueError: an array differs.
    """
    rows = table.penalty.numel()
    shapes = {
        "penalty": (torch.float32, (rows,)),
        "elements": (torch.float32, (rows,)),
        "countdown": (torch.int32, (rows,)),
        "sums": (torch.float32, (rows, 4)),
        "threshold": (torch.float32, (rows,)),
        "activity": (torch.float32, (rows,)),
        "nonfinite": (torch.int64, ()),
        "pending": (torch.float32, ()),
    }
    _flat_arrays("rows.table", table, shapes, table.penalty.device)


def channels(table: RowTable | ChannelArrays) -> None:
    """Check the arrays of ``channel_moments_``: dtypes, shapes, device, and the values of the gates.

    Gates on a GPU are not read, because the host would wait. The constructor of RowTable has checked them.

    Raises:
        ValueError: an array differs, arrays share memory, or an offset or a gate row is out of range.
    """
    rows, count = table.sums.numel() // 4, table.channel_dot.numel()
    shapes = {
        "gate_offsets": (torch.int64, (count + 1,)),
        "gate_rows": (torch.int64, (table.gate_rows.numel(),)),
        "sums": (torch.float32, (rows, 4)),
        "channel_dot": (torch.float32, (count,)),
        "channel_dot_sq": (torch.float32, (count,)),
        "updates": (torch.float32, ()),
        "pending": (torch.float32, ()),
    }
    _flat_arrays("table", table, shapes, table.sums.device)
    arrays = {f"table.{name}": [getattr(table, name)] for name in shapes}
    own = {name: array for name, array in arrays.items() if "gate" not in name}
    _written(own, {name: array for name, array in arrays.items() if name not in own})
    if table.gate_rows.device.type == "cpu" and not isinstance(table.gate_rows, FakeTensor):
        check_gates(table.gate_offsets.numpy(), table.gate_rows.numpy(), rows)


def _flat_arrays(
    of: str,
    table: RowTable | RowArrays | ChannelArrays,
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    device: torch.device,
) -> None:
    """Check that each array is contiguous, whole, and of the expected dtype, shape and device."""
    for name, (dtype, shape) in expected.items():
        array = getattr(table, name)
        is_plain = array.layout is torch.strided and array.is_contiguous() and array.shape == shape
        if not is_plain or array.dtype is not dtype or array.device != device or array.is_neg():
            raise ValueError(
                f"{of}.{name}: got {describe(array)}, expected contiguous {dtype} {list(shape)} on {device}"
            )
        whole(f"{of}.{name}", array)


def whole(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` when the storage of ``tensor`` is too small for its elements."""
    if not _memory.is_whole(tensor):
        raise ValueError(
            f"{name}: got a storage of {tensor.untyped_storage().nbytes()} bytes, expected one that holds "
            f"{describe(tensor)}"
        )


def _dense(name: str, tensor: Tensor) -> None:
    """Check that ``tensor`` is dense and its storage is whole."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: got layout {kind}, expected a dense tensor")
    whole(name, tensor)
