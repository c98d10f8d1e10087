"""Parameters in the middle of a training, with gradients, an optimizer and the row table of a Pruner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.bench.cases import Case
from sparsekern.bench.networks import NETWORKS, SHAPES, graph
from sparsekern.kernels.rows import RowTable
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.statistics import ChannelRows

MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]

# Number of steps before the measured step, and a typical magnitude of gradients.
STEPS, SCALE = 10.0, 1e-3


@dataclass
class Problem:
    """The tensors that a step reads and writes. Problems of one case and optimizer have equal elements."""

    params: list[nn.Parameter]
    optimizer: Optimizer
    table: RowTable | None

    @classmethod
    def of(cls, case: Case, make: MakeOptimizer, *, rows: bool = True) -> Problem:
        """The problem of a case.

        A tenth of the live channels is penalised and fades out, so that the step does all kinds of work.

        Args:
            case: the case.
            make: makes the optimizer.
            rows: whether a row table is attached and channels are masked.
        """
        device = torch.device(case.device)
        if case.tensors in NETWORKS:
            with torch.device("meta"):
                model = NETWORKS[case.tensors].make()
            model.to(case.dtype).to_empty(device=device)
        else:
            shapes = SHAPES[case.tensors]
            model = nn.ParameterList(torch.empty(shape, device=device, dtype=case.dtype) for shape in shapes)
        params = list(model.parameters())
        _fill(params)
        optimizer = make(params)
        _advance(optimizer)
        if not rows or case.masked is None:
            return cls(params, optimizer, None)
        if case.tensors in NETWORKS:
            table = _prune(model, case, optimizer)
        else:
            table = RowTable([(p, 0) for p in params], [np.arange(params[0].numel())])
            optim.attach(optimizer, table)
        table.threshold.fill_(SCALE)
        return cls(params, optimizer, table)

    def state(self, name: str) -> list[Tensor]:
        """One state tensor of each parameter, by torch's name of the state."""
        return [self.optimizer.state[param][name] for param in self.params]

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, in the order of the parameters."""
        return [param.grad for param in self.params if param.grad is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and their state by readable names."""
        named = {}
        for number, param in enumerate(self.params):
            named[f"parameter {number} {list(param.shape)}"] = param.detach()
            for key, value in self.optimizer.state[param].items():
                named[f"{key} {number} {list(param.shape)}"] = value
        return named

    def live_elements(self) -> int:
        """Number of elements outside masked rows, which a step must move."""
        total = sum(param.numel() for param in self.params)
        if self.table is None:
            return total
        views = zip(self.table.views, self.table.masked, strict=True)
        return total - sum(view.param.numel() // max(1, view.rows) * masked for view, masked in views)


def _fill(params: Sequence[nn.Parameter]) -> None:
    """Fill weights and gradients with repeating noise; new noise for large networks takes seconds."""
    weights, grads = _noise()
    start = 0
    for param in params:
        size = param.numel()
        param.data.copy_(_stretch(weights, start, size).view_as(param))
        param.grad = torch.empty_like(param).copy_(_stretch(grads, start, size).view_as(param))
        start = (start + size) % _PERIOD


_PERIOD = 1_000_003


@functools.cache
def _noise() -> tuple[Tensor, Tensor]:
    """Noise for weights and gradients, two periods each."""
    generator = torch.Generator().manual_seed(0)
    weights, grads = torch.randn(2, _PERIOD, generator=generator)
    return (0.1 * weights).repeat(2), (SCALE * grads).repeat(2)


def _stretch(noise: Tensor, start: int, size: int) -> Tensor:
    """``size`` numbers of the repeating noise from ``start`` on."""
    if size > _PERIOD:
        noise = noise.repeat(1 + size // _PERIOD)
    return noise[start : start + size]


def _advance(optimizer: Optimizer) -> None:
    """Give every parameter the optimizer state of a training after some steps, without making the steps."""
    adam = "betas" in optimizer.defaults
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if not adam:
                state["momentum_buffer"] = param.grad * 5
                continue
            # torch's optimizers keep `step` on the CPU unless they are fused.
            on_device = isinstance(optimizer, optim.RowOptimizer) or optimizer.defaults["fused"]
            state["step"] = torch.tensor(STEPS, device=param.device if on_device else "cpu")
            state["exp_avg"] = param.grad * 0.5
            state["exp_avg_sq"] = param.grad.square() * 0.01


def _prune(model: nn.Module, case: Case, optimizer: Optimizer) -> RowTable:
    """Attach a row table, and mask, penalise and fade out channels of ``model`` as a Pruner does."""
    channels = graph(case.tensors)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = ChannelRows(model, channels, {id(p) for p in parameters.values()}, decay=0.99)
    optim.attach(optimizer, rows.table)
    masks = Masks(channels, rows, parameters, optim.state_tensors(optimizer.state))
    order = np.random.default_rng(0).permutation(channels.num_channels)
    chosen = np.zeros(channels.num_channels, bool)
    chosen[order[: round((case.masked or 0.0) * len(order))]] = True
    some = np.zeros_like(chosen)
    some[np.flatnonzero(~chosen)[::10]] = True
    masks.penalise(some, 0.01)
    masks.fade_out(some, 1_000_000)
    masks.mask(chosen)
    return rows.table
