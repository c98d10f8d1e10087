"""The code that a user of each tool writes, one function per way of pruning: its lines are counted.

A function of ``ONCE`` takes a trained network and returns a smaller one. A function of ``WHILE`` takes a
network with random weights and trains it. The budget is a share of the multiply-adds, as torch counts them.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Sequence

import torch
import torch_pruning as tp
from torch import nn

import sparsekern
from benchmarks.peers.tasks import Batch, Task
from sparsekern.recipes.measure import macs

RATE = 2e-3  # learning rate of every training


def train(model: nn.Module, task: Task, steps: range) -> None:
    """The training that all share: AdamW on the batches of ``steps``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in steps:
        x, y = task.batch(step)
        task.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def once_default(model: nn.Module, task: Task, batches: Sequence[Batch], keep: float) -> nn.Module:
    """sparsekern's default."""
    network, _ = sparsekern.prune_once(model, task.example, keep=keep, calibration=batches, loss=task.loss)
    return network


def once_magnitude(model: nn.Module, task: Task, batches: Sequence[Batch], keep: float) -> nn.Module:
    """sparsekern by the norms of filters, without data."""
    network, _ = sparsekern.prune_once(model, task.example, keep=keep, select="magnitude")
    return network


def once_random(model: nn.Module, task: Task, batches: Sequence[Batch], keep: float) -> nn.Module:
    """The control: random channels, uniform widths."""
    random = sparsekern.criteria.Random(seed=0)
    network, _ = sparsekern.prune_once(model, task.example, keep=keep, select=random, allocate="uniform")
    return network


def torch_pruning_taylor(model: nn.Module, task: Task, batches: Sequence[Batch], keep: float) -> nn.Module:
    """Torch-Pruning by Taylor importance, ranked over all layers."""
    for x, y in batches:
        task.loss(model(x), y).backward()
    low, high, best = 0.0, 1.0, model
    for _ in range(8):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        for to, parameter in zip(candidate.parameters(), model.parameters(), strict=True):
            to.grad = parameter.grad
        pruner = tp.pruner.BasePruner(
            candidate,
            task.example,
            tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[candidate.get_submodule(task.head)],
        )
        pruner.step()
        if macs(candidate, task.example) > keep * macs(model, task.example):
            low = ratio
        else:
            high, best = ratio, candidate
    return best


def torch_pruning_magnitude(model: nn.Module, task: Task, batches: Sequence[Batch], keep: float) -> nn.Module:
    """Torch-Pruning by group magnitude, its default, the same share in all layers."""
    low, high, best = 0.0, 1.0, model
    for _ in range(8):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        pruner = tp.pruner.BasePruner(
            candidate,
            task.example,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            ignored_layers=[candidate.get_submodule(task.head)],
        )
        pruner.step()
        if macs(candidate, task.example) > keep * macs(model, task.example):
            low = ratio
        else:
            high, best = ratio, candidate
    return best


def while_pruner(model: nn.Module, task: Task, steps: int, tuning: int, keep: float) -> nn.Module:
    """sparsekern's Pruner in the training."""
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=RATE)
    pruner = sparsekern.Pruner(model, optimizer, task.example, keep=keep, steps=steps + tuning)
    model.train()
    for step in range(steps + tuning):
        x, y = task.batch(step)
        task.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return pruner.compact()


def while_bn_scale(model: nn.Module, task: Task, steps: int, tuning: int, keep: float) -> nn.Module:
    """Torch-Pruning's sparse training of batch norms, pruning, and the rest of the steps."""
    importance = tp.importance.BNScaleImportance()
    ignored = [model.get_submodule(task.head)]
    pruner = tp.pruner.BNScalePruner(
        model, task.example, importance, reg=1e-4, global_pruning=True, ignored_layers=ignored
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in range(steps):
        x, y = task.batch(step)
        task.loss(model(x), y).backward()
        pruner.regularize(model)
        optimizer.step()
        optimizer.zero_grad()
    low, high, best = 0.0, 1.0, model
    for _ in range(8):
        ratio = (low + high) / 2
        candidate = copy.deepcopy(model)
        pruner = tp.pruner.BNScalePruner(
            candidate,
            task.example,
            importance,
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[candidate.get_submodule(task.head)],
        )
        pruner.step()
        if macs(candidate, task.example) > keep * macs(model, task.example):
            low = ratio
        else:
            high, best = ratio, candidate
    train(best, task, range(steps, steps + tuning))
    return best


Once = Callable[[nn.Module, Task, Sequence[Batch], float], nn.Module]
While = Callable[[nn.Module, Task, int, int, float], nn.Module]

ONCE: dict[str, Once] = {
    "sparsekern, default": once_default,
    "sparsekern, magnitude, no data": once_magnitude,
    "Torch-Pruning, Taylor, global": torch_pruning_taylor,
    "Torch-Pruning, magnitude, no data": torch_pruning_magnitude,
    "control: random, uniform": once_random,
}
WHILE: dict[str, While] = {
    "sparsekern, Pruner": while_pruner,
    "Torch-Pruning, BN scale": while_bn_scale,
}


def lines_of_code(function: Callable[..., object]) -> int:
    """Lines of a function's body that hold code: without its signature, docstring and empty lines."""
    source = textwrap.dedent(inspect.getsource(function))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    text = (line.strip() for line in source.splitlines()[body[0].lineno - 1 :])
    return sum(bool(line) and not line.startswith("#") for line in text)
