"""Lists of tensors for one native call, and the checks that run before a list is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsekern.distributed.tensors import is_sharded, same_placement
from sparsekern.kernels.checks import DTYPES
from sparsekern.kernels.rows import Rows, RowTable


@dataclass(eq=False)
class TensorList:
    """Parameters of one group that share device and dtype, with their optimizer state.

    The list holds no gradients, so that a cached list does not keep them alive.

    Attributes:
        group: index of the group in ``param_groups``.
        first: whether state is missing (SGD's momentum before the first step) and the step creates it.
        params: the parameters; the local parts of sharded ones.
        where: position of each parameter's gradient among all gradients that the lists were built from.
        state: tensors by name of ``optimizer.state[p]``, one per parameter.
        rows: the rows of a table that the parameters have; None without a table.
        owners: the parameters as in ``param_groups``, DTensors included.
        columns: the lists of ``state`` in the order in which the op takes them; empty before the first step.
    """

    group: int
    first: bool
    params: list[Tensor]
    where: list[int]
    state: dict[str, list[Tensor]]
    rows: Rows | None
    owners: list[Tensor] = field(default_factory=list)
    columns: tuple[Sequence[Tensor], ...] = ()

    def pick(self, grads: list[Tensor]) -> list[Tensor]:
        """The gradients of these parameters, in their order."""
        return grads if len(grads) == len(self.where) else [grads[i] for i in self.where]


def split(
    group: int,
    params: Sequence[Tensor],
    buckets: Sequence[int],
    columns: dict[str, list[Any]],
    tables: Sequence[RowTable],
    numbers: Sequence[int],
    starts: Sequence[int],
    dims: Sequence[int],
    *,
    offset: int,
) -> list[TensorList]:
    """Split parameters into one list per bucket.

    torch.compile can trace this function: it reads no tensor.

    Args:
        group: index of the group in ``param_groups``.
        params: parameters of the group that have a gradient.
        buckets: list index of each parameter; indices count up from 0 in the order of first use.
        columns: state by name, one entry per parameter; None where the step creates it.
        tables: the attached tables.
        numbers: index of each parameter's table in ``tables``; equal within a bucket.
        starts: first row of each parameter, as in ``Rows``.
        dims: row dimension of each parameter, as in ``Rows``.
        offset: position of the group's first gradient among all gradients.

    Returns:
        The lists, in the order of their buckets.
    """
    lists: list[TensorList] = []
    for i, bucket in enumerate(buckets):
        if bucket == len(lists):
            first = any(column[i] is None for column in columns.values())
            kept: dict[str, list[Tensor]] = {} if first else {name: [] for name in columns}
            rows = Rows(tables[numbers[i]], [], []) if tables else None
            lists.append(TensorList(group, first, [], [], kept, rows))
        tensors = lists[bucket]
        tensors.params.append(params[i])
        tensors.where.append(offset + i)
        for name, column in tensors.state.items():
            column.append(columns[name][i])
        if tensors.rows is not None:
            tensors.rows.starts.append(starts[i])
            tensors.rows.dims.append(dims[i])
    return lists


def check_group(optimizer: str, index: int, group: dict[str, Any]) -> None:
    """Check that every parameter of a group that has a gradient can be stepped.

    Args:
        optimizer: class name, for the message.
        index: index of the group in ``param_groups``, for the message.
        group: the group.

    Raises:
        RuntimeError: no backend supports a parameter or its gradient, or ``differentiable`` is set.
    """
    if group["differentiable"]:
        raise RuntimeError(
            f"{optimizer}: param_groups[{index}] has differentiable=True, expected False: the fused "
            f"step is not recorded by autograd"
        )
    for param in group["params"]:
        if param.grad is not None:
            check_parameter(optimizer, index, group, param)


def check_parameter(optimizer: str, index: int, group: dict[str, Any], param: Tensor) -> None:
    """Check that a parameter that has a gradient can be stepped; arguments as in :func:`check_group`.

    Raises:
        RuntimeError: no backend supports the parameter or its gradient.
    """
    assert param.grad is not None
    problem = _problem(param, param.grad)
    if problem is not None:
        names = group.get("param_names")
        i = next(i for i, other in enumerate(group["params"]) if other is param)
        name = f" ({names[i]})" if names else ""
        raise RuntimeError(f"{optimizer}: parameter {i}{name} of group {index} has {problem}")


def check_wrapped(optimizer: str, index: int, group: dict[str, Any]) -> None:
    """Check that tensor wrappers among a group's parameters are DTensors, sharded or replicated.

    Raises:
        RuntimeError: a parameter is another wrapper, or a DTensor that is a partial sum.
    """
    for i, param in enumerate(group["params"]):
        if not is_traceable_wrapper_subclass(param):
            continue
        placements: Any = getattr(param, "placements", None) if is_sharded(param) else None
        if placements is None or any(placement.is_partial() for placement in placements):
            kind = type(param).__name__ + (f" placed as {placements}" if placements else "")
            raise RuntimeError(
                f"{optimizer}: parameter {i} of group {index} is a {kind}, expected a plain tensor or a "
                f"DTensor that is sharded or replicated"
            )


def check_table(optimizer: Optimizer, table: RowTable, attached: Iterable[RowTable]) -> None:
    """Check that the table has parameters of the optimizer and shares none with the tables ``attached``.

    Raises:
        RuntimeError: an attached table has rows of the same parameter.
        ValueError: none of the table's parameters is in the optimizer.
    """
    shared = {key for other in attached for key in other.index} & set(table.index)
    if shared:
        raise RuntimeError(
            f"table: one is attached already that has rows of {len(shared)} of these {len(table.views)} "
            f"parameters, expected rows of other parameters; remove that one's handle before"
        )
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if table.views and own.isdisjoint(table.index):
        raise ValueError(
            f"table: got rows of {len(table.views)} parameters, expected at least one of them among "
            f"the {len(own)} of this {type(optimizer).__name__}"
        )


def state_tensors(*states: Mapping[Any, Mapping[str, Any]]) -> Callable[[Tensor], list[Tensor]]:
    """A function that returns the state tensors of a parameter, for ``RowTable.zero_masked``.

    Args:
        states: the state of an optimizer and of its wrappers, each keyed by parameter.

    Returns:
        The function; it reads ``states`` on each call.
    """

    def of(param: Tensor) -> list[Tensor]:
        values = [value for state in states for value in state.get(param, {}).values()]
        return [value for value in values if isinstance(value, Tensor)]

    return of


def fit_state(name: str, value: Any, param: Tensor) -> Tensor:
    """Convert state from a checkpoint or a user to the form that the native step takes.

    The result is the same tensor where possible. ``step`` is copied if it is a number or has another dtype
    or device (torch keeps it on the CPU unless fused). Other state is copied if its memory order differs
    from that of the parameter.

    Args:
        name: key in ``optimizer.state[param]``.
        value: a tensor like ``param``; for ``step`` a number or a tensor.
        param: the parameter.

    Returns:
        A tensor with the parameter's strides; for ``step`` a float32 tensor on the parameter's device.

    Raises:
        RuntimeError: the shape, dtype, device or placement differs from that of the parameter.
    """
    if name == "step":
        return torch.as_tensor(value, dtype=torch.float32, device=param.device)
    if value.shape != param.shape or value.dtype != param.dtype or value.device != param.device:
        raise RuntimeError(
            f"optimizer state {name!r}: got {value.dtype} {list(value.shape)} on {value.device}, "
            f"expected {param.dtype} {list(param.shape)} on {param.device} as its parameter"
        )
    if not same_placement(value, param):
        raise RuntimeError(
            f"optimizer state {name!r}: got {_placement(value)}, "
            f"expected {_placement(param)} as its parameter"
        )
    if value.stride() == param.stride():
        return value
    like_param = torch.empty_like(param, memory_format=torch.preserve_format, requires_grad=False)
    return value if value.stride() == like_param.stride() else like_param.copy_(value)


def rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A group's learning rate in the form that the operations take: a float, or a tensor on ``device``."""
    return lr.to(device, non_blocking=True) if isinstance(lr, Tensor) else float(lr)


def _problem(param: Tensor, grad: Tensor) -> str | None:
    """The reason why no backend supports the parameter or its gradient; None if one does."""
    if grad.layout is not torch.strided:
        return f"a sparse gradient ({grad.layout}), expected a dense one"
    if param.is_complex():
        return f"complex dtype {param.dtype}, expected a real one (step torch.view_as_real of it)"
    if param.dtype not in DTYPES:
        return f"dtype {param.dtype}, expected float32, float64, bfloat16 or float16"
    if param.layout is not torch.strided:
        return f"layout {param.layout}, expected a dense tensor"
    if grad.dtype is not param.dtype:
        return f"a gradient of dtype {grad.dtype}, expected {param.dtype} as the parameter"
    if not same_placement(grad, param):
        return f"a gradient that is {_placement(grad)}, expected {_placement(param)} as the parameter"
    return None


def _placement(tensor: Tensor) -> str:
    """The placement of a tensor, for messages."""
    return f"a DTensor {tensor.placements}" if is_sharded(tensor) else "a plain tensor"  # type: ignore[attr-defined]
