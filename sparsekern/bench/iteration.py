"""Whole training iterations: forward, backward and step under a Pruner, against torch without any pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.bench.cases import Case
from sparsekern.bench.check import difference, differing, forced
from sparsekern.bench.comparison import OURS, Contest
from sparsekern.bench.networks import NETWORKS
from sparsekern.bench.problem import Problem
from sparsekern.fusion import fuse
from sparsekern.prune import Pruner
from sparsekern.prune.decide.criteria import GradientCount, Taylor

# Gradients of two implementations of a network, as a share of the largest of their tensor.
GRADIENTS = 1e-3

MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]


@dataclass
class Training:
    """A network in training; two of the same case begin with equal weights."""

    model: nn.Module
    optimizer: Optimizer
    example: Tensor

    @classmethod
    def of(cls, case: Case, make: MakeOptimizer, *, pruned: bool, fused: bool = False) -> Training:
        """Of the case's network; ``pruned`` under a Pruner that decides nothing in these iterations, with
        ``fused`` norms and activations that count for it."""
        network = NETWORKS[case.tensors]
        device = torch.device(case.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = network.make()
        model.to(device, case.dtype)
        example = network.batch().to(device, case.dtype)
        if fused:
            fuse(model, example)
        optimizer = make(list(model.parameters()))
        if pruned:
            select = Taylor() * GradientCount(level="activation") if fused else None
            Pruner(model, optimizer, example, keep=0.5, steps=1_000_000, select=select)
        return cls(model, optimizer, example)

    def backward(self) -> Tensor:
        """Fresh gradients; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.model(self.example).square().mean()
        loss.backward()
        return loss.detach()

    def iterate(self) -> None:
        """One iteration."""
        self.backward()
        self.optimizer.step()

    def problem(self) -> Problem:
        """What its step reads and writes."""
        tables = self.optimizer.tables if isinstance(self.optimizer, optim.RowOptimizer) else ()
        return Problem(list(self.model.parameters()), self.optimizer, tables[0] if tables else None)


def iteration(case: Case, *, fused: bool = False) -> Contest:
    """Our AdamW under a Pruner against torch's AdamW without, and with ``fused`` norms against torch's.

    Right is a result with eager torch's loss and gradients to rounding (``fused``: in float64), and
    with the reference backend's step on the same gradients.
    """
    mine = Training.of(case, optim.AdamW, pruned=True, fused=fused)
    makers = {
        "torch fused": functools.partial(torch.optim.AdamW, fused=True),
        "torch foreach": functools.partial(torch.optim.AdamW, foreach=True),
    }
    theirs = {name: Training.of(case, make, pruned=False) for name, make in makers.items()}

    def wrong() -> str | None:
        pair = mine, theirs["torch fused"]
        if fused:
            # Another order of operations tips units over their kinks in float32: there is nothing to compare.
            wide = replace(case, dtype=torch.float64)
            pair = (
                Training.of(wide, optim.AdamW, pruned=True, fused=True),
                Training.of(wide, makers["torch fused"], pruned=False),
            )
            mine.backward()
        return _wrong_gradients(*pair) or _wrong_step(case, mine, fused)

    sides = {OURS: mine.iterate} | {name: training.iterate for name, training in theirs.items()}
    return Contest(sides, {}, sum(p.numel() for p in mine.model.parameters()), wrong)


def _wrong_gradients(mine: Training, theirs: Training) -> str | None:
    losses = mine.backward(), theirs.backward()
    if text := differing("loss", *losses, GRADIENTS * losses[1].double().abs()):
        return text
    largest = max(p.grad.abs().max().item() for p in theirs.model.parameters() if p.grad is not None)
    for (name, param), other in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert param.grad is not None and other.grad is not None
        # Some are 0 but for rounding.
        allowed = GRADIENTS * other.grad.double().abs().max() + torch.finfo(param.dtype).eps * largest
        if text := differing(f"gradient of {name}", param.grad, other.grad, allowed):
            return text
    return None


def _wrong_step(case: Case, mine: Training, fused: bool) -> str | None:
    """With the gradients that ``mine`` has."""
    twin = Training.of(case, optim.AdamW, pruned=True, fused=fused)
    for param, other in zip(twin.model.parameters(), mine.model.parameters(), strict=True):
        assert other.grad is not None
        param.grad = other.grad.clone()
    mine.optimizer.step()
    with forced("reference"):
        twin.optimizer.step()
    return difference(mine.problem(), twin.problem())
