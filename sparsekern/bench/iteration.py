"""Whole training iterations (forward, backward, step) under a Pruner, against torch without pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern import optim
from sparsekern.bench.cases import Case
from sparsekern.bench.check import difference, forced
from sparsekern.bench.comparison import OURS, Comparison
from sparsekern.bench.networks import NETWORKS
from sparsekern.bench.problem import Problem
from sparsekern.fusion import fuse
from sparsekern.kernels.selfcheck.comparison import differing
from sparsekern.prune import Pruner
from sparsekern.prune.decide.criteria import GradientCount, Taylor

# Allowed difference between the gradients of two implementations, over the largest gradient of the tensor.
GRADIENTS = 1e-3

MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]


@dataclass
class Training:
    """A network in training. All instances for one case begin with equal weights."""

    model: nn.Module
    optimizer: Optimizer
    example: Tensor

    @classmethod
    def of(cls, case: Case, make: MakeOptimizer, *, pruned: bool, fused: bool = False) -> Training:
        """A training of the case's network.

        Args:
            case: the case.
            make: makes the optimizer.
            pruned: whether a Pruner is attached. Its first event comes after the measured iterations.
            fused: whether norms and activations are fused and count gradients for the Pruner.
        """
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
        """Compute new gradients and return the loss."""
        self.optimizer.zero_grad()
        loss = self.model(self.example).square().mean()
        loss.backward()
        return loss.detach()

    def iterate(self) -> None:
        """Run one iteration."""
        self.backward()
        self.optimizer.step()

    def problem(self) -> Problem:
        """The tensors that the optimizer step reads and writes."""
        tables = self.optimizer.tables if isinstance(self.optimizer, optim.RowOptimizer) else ()
        return Problem(list(self.model.parameters()), self.optimizer, tables[0] if tables else None)


def iteration(case: Case, *, fused: bool = False) -> Comparison:
    """sparsekern's AdamW under a Pruner, against torch's AdamW without pruning.

    The result is right if loss and gradients equal those of eager torch to rounding (``fused``: in float64),
    and the step equals the reference backend's step on the same gradients.

    Args:
        case: the case.
        fused: whether sparsekern's candidate has fused norms and activations.
    """
    mine = Training.of(case, optim.AdamW, pruned=True, fused=fused)
    makers = {
        "torch fused": functools.partial(torch.optim.AdamW, fused=True),
        "torch foreach": functools.partial(torch.optim.AdamW, foreach=True),
    }
    theirs = {name: Training.of(case, make, pruned=False) for name, make in makers.items()}

    def mismatch() -> str | None:
        pair = mine, theirs["torch fused"]
        if fused:
            # In float32 another order of operations flips ReLUs near zero, so the comparison is in float64.
            wide = replace(case, dtype=torch.float64)
            pair = (
                Training.of(wide, optim.AdamW, pruned=True, fused=True),
                Training.of(wide, makers["torch fused"], pruned=False),
            )
            mine.backward()
        return _gradient_mismatch(*pair) or _step_mismatch(case, mine, fused)

    candidates = {OURS: mine.iterate} | {name: training.iterate for name, training in theirs.items()}
    return Comparison(candidates, {}, sum(p.numel() for p in mine.model.parameters()), mismatch)


def _gradient_mismatch(mine: Training, theirs: Training) -> str | None:
    losses = mine.backward(), theirs.backward()
    if text := differing("loss", *losses, GRADIENTS * losses[1].double().abs()):
        return text
    largest = max(p.grad.abs().max().item() for p in theirs.model.parameters() if p.grad is not None)
    for (name, param), other in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert param.grad is not None and other.grad is not None
        # Some gradients are zero except for rounding errors.
        allowed = GRADIENTS * other.grad.double().abs().max() + torch.finfo(param.dtype).eps * largest
        if text := differing(f"gradient of {name}", param.grad, other.grad, allowed):
            return text
    return None


def _step_mismatch(case: Case, mine: Training, fused: bool) -> str | None:
    """Compare the step of ``mine`` with the reference backend's step on the same gradients."""
    twin = Training.of(case, optim.AdamW, pruned=True, fused=fused)
    for param, other in zip(twin.model.parameters(), mine.model.parameters(), strict=True):
        assert other.grad is not None
        param.grad = other.grad.clone()
    mine.optimizer.step()
    with forced("reference"):
        twin.optimizer.step()
    return difference(mine.problem(), twin.problem())
