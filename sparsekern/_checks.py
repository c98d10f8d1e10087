"""Checks of arguments, shared by every layer.

Each raises one exception that names the argument, what came and what was expected. They change
nothing and read no device value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparsekern._rows import ChannelArrays, RowArrays, Rows, RowTable, check_gates

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What the backends take."""


def number(
    name: str,
    value: object,
    low: float = -float("inf"),
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` as a float inside an interval, closed unless said otherwise.

    Raises:
        TypeError: it is no real number.
        ValueError: it is NaN or outside.
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
    """Every list has one entry for each parameter.

    Args:
        lists: by the name of the argument.
        rows: of ``params``.

    Raises:
        ValueError: a list has another number of entries.
    """
    if rows is not None and rows.table is not None:
        lists = {**lists, "rows.starts": rows.starts, "rows.dims": rows.dims}
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name}: got {len(values)} entries, expected {len(params)} as params")


def tensors(
    params: Sequence[Tensor],
    lists: Mapping[str, Sequence[Tensor]],
    steps: Sequence[Tensor],
    rows: Rows | None,
) -> None:
    """The tensors of one call fit each other and their rows, one by one.

    Args:
        params: at least one.
        lists: like ``params``, by the name of the argument.
        steps: float32 counters of one element, one per parameter, or none.
        rows: of ``params``.

    Raises:
        TypeError: a dtype or layout that no backend takes.
        ValueError: another number of tensors, or one that differs.
    """
    parameters(params)
    for name, values in lists.items():
        like(name, values, params)
    if steps:
        counters(steps, params)
    inside(rows, params)


def parameters(params: Sequence[Tensor]) -> None:
    """At least one parameter, all dense, of one supported dtype, on one device.

    Raises:
        TypeError: a dtype or layout that no backend takes.
        ValueError: several devices or dtypes.
    """
    dtype, device = params[0].dtype, params[0].device
    if dtype not in DTYPES:
        raise TypeError(
            f"params[0]: got {_describe(params[0])}, expected float32, float64, bfloat16 or float16"
        )
    for i, param in enumerate(params):
        if param.dtype is not dtype or param.device != device:
            raise ValueError(
                f"params[{i}]: got {_describe(param)}, expected {dtype} on {device} as params[0]"
            )
        _dense(f"params[{i}]", param)
    own_memory("params", params)


def like(name: str, tensors: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """``tensors`` match the parameters one by one in shape, dtype, device, and are dense.

    Raises:
        TypeError: a sparse tensor.
        ValueError: another number of tensors, or one that differs.
    """
    lengths(params, {name: tensors}, None)
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        _dense(f"{name}[{i}]", tensor)
        if _kind(tensor) != _kind(param):
            raise ValueError(
                f"{name}[{i}]: got {_describe(tensor)}, expected {_describe(param)} as params[{i}]"
            )
    if name != "grads":
        own_memory(name, tensors)


def own_memory(name: str, tensors: Sequence[Tensor]) -> None:
    """No element of a tensor that is written to is there twice, as in an expanded one.

    Raises:
        ValueError: one is.
    """
    for i, tensor in enumerate(tensors):
        if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{name}[{i}]: got strides {list(tensor.stride())}, expected memory for each element"
            )


def empty(name: str, tensors: Sequence[Tensor], unless: str) -> None:
    """There are no such tensors, because an option says so.

    Raises:
        ValueError: there are.
    """
    if tensors:
        raise ValueError(f"{name}: got {len(tensors)} entries, expected none unless {unless}")


def scalar(name: str, value: object, device: torch.device) -> None:
    """``value`` is None, a number, or a tensor of one floating element on ``device``.

    Raises:
        ValueError: it is another tensor.
    """
    if not isinstance(value, Tensor):
        return
    if value.numel() != 1 or not value.is_floating_point() or value.device != device:
        raise ValueError(f"{name}: got {_describe(value)}, expected one floating-point element on {device}")


def counters(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Step counters: one float32 element for each parameter, on its device or on the CPU.

    Raises:
        ValueError: another number of them, another size, dtype, layout or device.
    """
    if len(steps) != len(params):
        raise ValueError(f"steps: got {len(steps)} entries, expected {len(params)} as params")
    for i, (value, param) in enumerate(zip(steps, params, strict=True)):
        fits = value.numel() == 1 and value.dtype is torch.float32 and value.layout is torch.strided
        if not fits or value.device not in (param.device, torch.device("cpu")):
            raise ValueError(
                f"steps[{i}]: got {_describe(value)} ({value.layout}), expected one float32 element on "
                f"{param.device} or the CPU"
            )


def inside(rows: Rows | None, params: Sequence[Tensor]) -> None:
    """The rows of every tracked parameter lie inside their table, which is whole and on the same device.

    Raises:
        ValueError: they do not, or it is not.
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
    """The arrays of a table have their types and sizes, and no gaps.

    Raises:
        ValueError: one has not.
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
    """The arrays of channels have their types and sizes, without gaps, on one device; gates are rows.

    The gates are read on the CPU alone: a GPU would be waited for, and the constructor of RowTable has
    compared them before they got there.

    Raises:
        ValueError: an array has not, or an offset or a row is outside.
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
    if table.gate_rows.device.type == "cpu":
        check_gates(table.gate_offsets.numpy(), table.gate_rows.numpy(), rows)


def _flat_arrays(
    of: str,
    table: RowTable | RowArrays | ChannelArrays,
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    device: torch.device,
) -> None:
    for name, (dtype, shape) in expected.items():
        array = getattr(table, name)
        whole = array.layout is torch.strided and array.is_contiguous() and array.shape == shape
        if not whole or array.dtype is not dtype or array.device != device:
            raise ValueError(
                f"{of}.{name}: got {_describe(array)}, expected contiguous {dtype} {list(shape)} on {device}"
            )


def _dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, expected a dense tensor")


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
