"""Whole training iterations: forward, backward and step under a Pruner, against torch without any pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.bench.cases import Case
from sparsekern.bench.check import difference, differing, forced
from sparsekern.bench.contest import OURS, Contest
from sparsekern.bench.networks import NETWORKS
from sparsekern.bench.problem import Problem
from sparsekern.prune import Pruner

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
    def of(cls, case: Case, make: MakeOptimizer, *, pruned: bool) -> Training:
        """Of the case's network; ``pruned`` under a Pruner that decides nothing in these iterations."""
        network = NETWORKS[case.tensors]
        device = torch.device(case.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = network.make()
        model.to(device, case.dtype)
        example = network.batch().to(device, case.dtype)
        optimizer = make(list(model.parameters()))
        if pruned:
            Pruner(model, optimizer, example, keep=0.5, steps=1_000_000)
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
        table = self.optimizer._table if isinstance(self.optimizer, optim.RowOptimizer) else None
        return Problem(list(self.model.parameters()), self.optimizer, table)


def iteration(case: Case) -> Contest:
    """Our AdamW under a Pruner against torch's AdamW without.

    Right is a result with eager torch's loss and gradients to rounding, and with the reference backend's
    step on the same gradients.
    """
    mine = Training.of(case, optim.AdamW, pruned=True)
    makers = {
        "torch fused": functools.partial(torch.optim.AdamW, fused=True),
        "torch foreach": functools.partial(torch.optim.AdamW, foreach=True),
    }
    theirs = {name: Training.of(case, make, pruned=False) for name, make in makers.items()}

    def wrong() -> str | None:
        return _wrong_gradients(mine, theirs["torch fused"]) or _wrong_step(case, mine)

    sides = {OURS: mine.iterate} | {name: training.iterate for name, training in theirs.items()}
    return Contest(sides, {}, sum(p.numel() for p in mine.model.parameters()), wrong)


def _wrong_gradients(mine: Training, theirs: Training) -> str | None:
    losses = mine.backward(), theirs.backward()
    if text := differing("loss", *losses, GRADIENTS * losses[1].double().abs()):
        return text
    for (name, param), other in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert param.grad is not None and other.grad is not None
        allowed = GRADIENTS * other.grad.double().abs().max()
        if text := differing(f"gradient of {name}", param.grad, other.grad, allowed):
            return text
    return None


def _wrong_step(case: Case, mine: Training) -> str | None:
    """With the gradients that ``mine`` has."""
    twin = Training.of(case, optim.AdamW, pruned=True)
    for param, other in zip(twin.model.parameters(), mine.model.parameters(), strict=True):
        assert other.grad is not None
        param.grad = other.grad.clone()
    mine.optimizer.step()
    with forced("reference"):
        twin.optimizer.step()
    return difference(mine.problem(), twin.problem())
