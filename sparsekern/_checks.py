"""Checks of arguments, shared by every layer: one exception each, naming the argument, what came and what
was expected. They change nothing and read no device values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern._rows import Rows

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


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


def scalar(name: str, value: Tensor | None, device: torch.device) -> None:
    """``value`` is None or has one element of a real floating dtype on ``device``.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return
    if value.numel() != 1 or not value.is_floating_point() or value.device != device:
        raise ValueError(
            f"{name}: got {_describe(value)}, expected one floating-point element on {device}"
        )


def params(tensors: Sequence[Tensor]) -> None:
    """The parameters of one call: dense, of one supported dtype, on one device.

    Raises:
        TypeError: a dtype or layout that no backend takes.
        ValueError: tensors of several devices or dtypes.
    """
    if not tensors:
        return
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in DTYPES:
        expected = "float32, float64, bfloat16 or float16"
        raise TypeError(f"params[0]: got {_describe(tensors[0])}, expected {expected}")
    for i, tensor in enumerate(tensors):
        if tensor.dtype is not dtype or tensor.device != device:
            raise ValueError(
                f"params[{i}]: got {_describe(tensor)}, expected {dtype} on {device} as params[0]"
            )
        if tensor.layout is not torch.strided:
            raise TypeError(f"params[{i}]: got layout {tensor.layout}, expected a dense tensor")


def like(name: str, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """``tensors`` match the parameters ``expected`` one by one in shape, dtype, device and layout.

    Raises:
        TypeError: a sparse tensor.
        ValueError: another number of tensors, or one that differs.
    """
    length(name, tensors, len(expected))
    if not expected:
        return
    dtype, device = expected[0].dtype, expected[0].device
    for i, (tensor, param) in enumerate(zip(tensors, expected, strict=True)):
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}[{i}]: got layout {tensor.layout}, expected a dense tensor")
        if tensor.dtype is not dtype or tensor.shape != param.shape or tensor.device != device:
            raise ValueError(
                f"{name}[{i}]: got {_describe(tensor)}, expected {_describe(param)} as its parameter"
            )


def length(name: str, values: Sequence[object], expected: int) -> None:
    """There are ``expected`` values, one per parameter.

    Raises:
        ValueError: there are not.
    """
    if len(values) != expected:
        raise ValueError(
            f"{name}: got {len(values)} entries, expected {expected}, one per parameter"
        )


def steps(values: Sequence[Tensor], expected: Sequence[Tensor], *, same_device: bool) -> None:
    """One-element float32 step counters, one per parameter.

    Raises:
        ValueError: another number of them, another size or dtype, or (``same_device``) another device.
    """
    length("steps", values, len(expected))
    for i, value in enumerate(values):
        if value.numel() != 1 or value.dtype is not torch.float32:
            raise ValueError(f"steps[{i}]: got {_describe(value)}, expected one float32 element")
        if same_device and value.device != expected[i].device:
            raise ValueError(
                f"steps[{i}]: got {_describe(value)}, expected it on {expected[i].device} as its "
                f"parameter, because grad_scale or found_inf was given"
            )


def rows(value: Rows | None, tensors: Sequence[Tensor]) -> None:
    """Rows fit the parameters and lie inside their table, on the same device.

    Raises:
        ValueError: they do not.
    """
    if value is None or value.table is None or not tensors:
        return
    length("rows.starts", value.starts, len(tensors))
    length("rows.dims", value.dims, len(tensors))
    table = value.table
    total = table.penalty.shape[0]
    if table.penalty.device != tensors[0].device:
        raise ValueError(
            f"rows.table: got arrays on {table.penalty.device}, expected {tensors[0].device} as the "
            f"parameters (make the table after the model was moved)"
        )
    for i, (start, dim) in enumerate(zip(value.starts, value.dims, strict=True)):
        if start < 0:
            continue
        shape = tensors[i].shape
        if not 0 <= dim < len(shape) or start + shape[dim] > total:
            raise ValueError(
                f"rows: got start {start} and dim {dim} for params[{i}] of shape {list(shape)}, expected "
                f"rows inside the {total} of the table"
            )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
