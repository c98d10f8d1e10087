"""Optimizers under test, each with its counterpart in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.kernels.checks import DTYPES
from sparsekern.kernels.rows import RowTable


@dataclass(frozen=True)
class Case:
    ours: type[optim.RowOptimizer]
    theirs: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.ours.__name__, *self.options])


CASES = (
    Case(optim.SGD, torch.optim.SGD),
    Case(optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.25}),
    Case(optim.Adam, torch.optim.Adam),
    Case(optim.AdamW, torch.optim.AdamW, {"amsgrad": True}),
)
"""Optimizers with and without each kind of state; the contract holds for all."""


@dataclass(frozen=True)
class OptimizerFactory:
    """Makes optimizers of one case, with or without a table that tracks their parameters."""

    case: Case
    attached: bool

    def __call__(self, params: Iterable[Any], **options: Any) -> optim.RowOptimizer:
        optimizer = self.case.ours(params, **{"lr": 0.05} | self.case.options | options)
        if self.attached:
            self.attach(optimizer)
        return optimizer

    def theirs(self, params: Iterable[Any], **options: Any) -> Optimizer:
        """The optimizer of torch, with its plain per-parameter loop."""
        options = {"lr": 0.05, "foreach": False} | self.case.options | options
        return self.case.theirs(params, **options)

    def attach(self, optimizer: Optimizer) -> RowTable:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        table = table_of(params)
        optim.attach(optimizer, table)
        return table


def table_of(params: Iterable[Tensor]) -> RowTable:
    """A table with the rows of all parameters that have any; every row is a channel of its own.

    Rows lie in dimension 1 where that is the longer one.
    """
    rows = [(p, _row_dim(p)) for p in unique(params) if p.dim() and p.dtype in DTYPES]
    total = sum(p.shape[dim] for p, dim in rows)
    return RowTable(rows, [[r] for r in range(total)], decay=0.5)


def attached_table(optimizer: optim.RowOptimizer) -> RowTable | None:
    """The one table of an optimizer under test, if it has one."""
    assert len(optimizer.tables) <= 1
    return optimizer.tables[0] if optimizer.tables else None


def unique(params: Iterable[Tensor]) -> list[Any]:
    return list({id(p): p for p in params}.values())


def _row_dim(param: Tensor) -> int:
    return int(param.dim() > 2 and param.shape[1] > param.shape[0])


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of the usual kinds.

    They are a convolution in either memory format, a transposed one, a depthwise one, a matrix, biases and a
    scalar.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 4, 3, 3), (8, 4, 3, 3), (3, 10, 2, 2), (5, 1, 3, 3), (7, 33), (40,), (1,), ()]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[1] = params[1].contiguous(memory_format=torch.channels_last)
    return [Parameter(p.to(dtype)) for p in params]


def copies(params: Iterable[Tensor]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def set_grads(params: Sequence[Tensor], seed: int, also: Sequence[Tensor] = (), scale: float = 1) -> None:
    """Give ``params`` random gradients in their memory layout, and ``also`` the same values."""
    generator = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator) * scale
        for one in (param, *also[i : i + 1]):
            one.grad = torch.empty_like(one).copy_(grad)


def snapshot(optimizer: Optimizer, table: RowTable | None = None) -> list[Any]:
    """Copies of all values that a step changes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values: list[Any] = []
    for param in params:
        values.append(param.detach().clone())
        state = optimizer.state.get(param, {}).values()
        values += [v.clone() if isinstance(v, Tensor) else v for v in state]
    if table is not None:
        values += [v.clone() for v in table.state_dict().values() if isinstance(v, Tensor)]
    return values


def assert_same(these: Sequence[Any], those: Sequence[Any]) -> None:
    """Equal bit for bit, NaN included."""
    torch.testing.assert_close(list(these), list(those), rtol=0, atol=0, equal_nan=True)


def assert_near(these: Sequence[Tensor], those: Sequence[Tensor]) -> None:
    """Equal up to the rounding of a few steps."""
    for this, that in zip(these, those, strict=True):
        torch.testing.assert_close(this.detach(), that.detach(), rtol=1e-5, atol=1e-6)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def train(model: nn.Module, step: Callable[[], Any], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(5, 2, 4, 4, generator=generator)).square().mean().backward()
        step()
