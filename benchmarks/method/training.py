"""One training of one arm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern
from benchmarks.method import widths
from benchmarks.method.arms import Arm
from benchmarks.method.sets import LR_WARMUP, Set
from sparsekern.graph import ChannelGraph
from sparsekern.recipes.batches import Batches
from sparsekern.recipes.data import Split, normalise
from sparsekern.recipes.measure import parameters
from sparsekern.recipes.metrics import Scores, SegmentationLoss, predict, scores
from sparsekern.recipes.settings import Settings, build_model
from sparsekern.recipes.train import learning_rate

AVERAGED = 0.98  # decay of the averaged weights per step


@dataclass
class Outcome:
    """The result of a training.

    Attributes:
        model: the small network, in evaluation mode; averaged: the same with averaged weights.
        widths: channels by group, of the networks that have groups.
        loss: of the last twentieth of the steps.
        seconds, processor_seconds: of the loop, events included and scores excluded.
    """

    model: nn.Module
    averaged: nn.Module
    widths: dict[str, int]
    loss: float
    seconds: float
    processor_seconds: float


class VoidLoss(nn.Module):
    """The recipes' loss, over the pixels whose target is not `void`."""

    def __init__(self, void: int | None) -> None:
        super().__init__()
        self.void, self.plain = void, SegmentationLoss()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.void is None:
            return self.plain(logits, target)
        valid = target != self.void
        entropy = F.cross_entropy(logits, target, ignore_index=self.void)
        truth = F.one_hot(target.where(valid, 0), logits.shape[1]).movedim(-1, 1)[:, 1:] * valid[:, None]
        share = logits.softmax(1)[:, 1:] * valid[:, None]
        both = (share * truth).sum((0, 2, 3))
        either = share.sum((0, 2, 3)) + truth.sum((0, 2, 3))
        return entropy + 1 - ((2 * both + 1) / (either + 1)).mean()


@torch.inference_mode()
def score(model: nn.Module, split: Split, classes: int, void: int | None, batch: int = 8) -> Scores:
    """Scores of `model`, in evaluation mode, over all pixels of whole images that are not `void`."""
    confusion = torch.zeros(classes * classes, dtype=torch.long)
    sizes = np.stack([split.heights, split.widths], axis=1)
    for size in np.unique(sizes, axis=0):
        same = np.flatnonzero((sizes == size).all(1))
        for start in range(0, len(same), batch):
            index = [int(i) for i in same[start : start + batch]]
            x = normalise(np.stack([split.image(i) for i in index]))
            found = predict(model(x.to(memory_format=torch.channels_last)))
            truth = torch.from_numpy(np.stack([split.mask(i) for i in index])).long()
            valid = torch.ones_like(truth, dtype=torch.bool) if void is None else truth != void
            pairs = truth[valid] * classes + found[valid]
            confusion += torch.bincount(pairs, minlength=classes * classes)
    return scores(confusion.view(classes, classes))


@cache
def graph_of(settings: Settings) -> ChannelGraph:
    """The channels of the full network; its weights do not matter."""
    return sparsekern.trace(build_model(settings), example(settings))


def example(settings: Settings) -> Tensor:
    return torch.zeros(1, 3, settings.crop, settings.crop)


def network(
    arm: Arm, settings: Settings, keep: float, seed: int, default: Mapping[str, int] | None
) -> tuple[nn.Module, dict[str, int]]:
    """The network that an arm trains, and its widths by group if it has the groups of the full network.

    `default`: the widths that the default arm of the same seed has ended with.
    """
    if arm.widths == "multiplier":
        return build_model(replace(settings, seed=seed, width=arm.multiplier)), {}
    model, graph = build_model(replace(settings, seed=seed)), graph_of(settings)
    if arm.widths == "dense":
        return model, {group.name: len(group.channels) for group in graph.groups}
    if arm.widths == "default":
        assert default is not None
        own = dict(default)
    else:
        own = (widths.scaled if arm.widths == "uniform" else widths.flat)(graph, keep)
    return widths.rebuilt(model, graph, own, seed), own


def train(
    arm: Arm,
    data: Set,
    settings: Settings,
    keep: float,
    seed: int,
    *,
    steps: int,
    default: Mapping[str, int] | None = None,
) -> Outcome:
    """Train one arm; equal seeds give equal first weights, order and augmentation in all arms.

    Args:
        arm, data, keep, seed: what to train.
        settings: of the set.
        steps: optimizer steps, those of `settings` but for arms of equal time.
        default: see `network`.
    """
    model, own = network(arm, settings, keep, seed, default)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if arm.fused:
        sparsekern.fusion.fuse(model, example(settings))
    model.train()
    rate, decay = settings.lr, settings.weight_decay
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED), use_buffers=True)
    optimizer: torch.optim.Optimizer
    pruner = None
    if arm.select is None:
        optimizer = torch.optim.AdamW(_groups(model), lr=rate, weight_decay=decay, fused=True)
    else:
        apart = arm.fan_in_power != 0
        optimizer = sparsekern.optim.AdamW(_groups(model, apart), lr=rate, weight_decay=decay)
        pruner = sparsekern.Pruner(
            model,
            optimizer,
            example(settings),
            keep=keep,
            steps=steps,
            select=arm.select(seed),
            allocate=arm.allocate,
            round_to=1,
            shrink=True,
            also=[averaged],
            **arm.options,
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rates(arm, model, optimizer, pruner, steps))
    batches = Batches(data.load()[0], settings.batch, settings.crop, seed)
    outcome = _loop(model, averaged, optimizer, schedule, batches, VoidLoss(data.void), steps)
    if pruner is not None:
        assert pruner.finished
        own = {name: kept for name, (kept, _) in pruner.widths().items()}
    return replace(outcome, widths=own)


def _groups(model: nn.Module, apart: bool = False) -> list[dict[str, Any]]:
    """Groups of an optimizer: the weights, or each weight, and last the biases and gains."""
    parameters = list(model.parameters())
    weights = [p for p in parameters if p.dim() > 1]
    groups = [[p] for p in weights] if apart else [weights]
    return [{"params": group} for group in (*groups, [p for p in parameters if p.dim() < 2])]


def _rates(
    arm: Arm,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: sparsekern.Pruner | None,
    steps: int,
) -> list[Callable[[int], float]]:
    """Learning rate factors of the groups; with a power of `arm` they rise as the network shrinks."""

    def rate(step: int, *, inputs: Callable[[], float], power: float) -> float:
        factor = learning_rate(step, steps=steps, warmup=LR_WARMUP) * inputs() ** -arm.fan_in_power
        return factor * pruner.metrics()["macs_share"] ** -power if pruner is not None and power else factor

    *weights, _ = optimizer.param_groups
    transposed = {m.weight for m in model.modules() if isinstance(m, nn.ConvTranspose2d)}
    shares = [_share_of_inputs(w, w in transposed) for w in (group["params"][0] for group in weights)]
    rates = [partial(rate, inputs=share, power=arm.rate_power) for share in shares]
    return [*rates, partial(rate, inputs=lambda: 1.0, power=arm.rate_power + arm.gain_power)]


def _share_of_inputs(weight: Tensor, transposed: bool) -> Callable[[], float]:
    """Tells which share of the inputs that an output channel has now is left."""

    def inputs() -> int:
        return (weight[:, 0] if transposed else weight[0]).numel()

    first = inputs()
    return lambda: inputs() / first


def _loop(
    model: nn.Module,
    averaged: AveragedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    batches: Batches,
    criterion: nn.Module,
    steps: int,
) -> Outcome:
    losses = []
    begin, begin_processor = time.perf_counter(), time.process_time()
    for x, y in batches.steps(0, steps):
        loss = criterion(model(x.to(memory_format=torch.channels_last)), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        averaged.update_parameters(model)
        losses.append(loss.item())
    seconds, processor = time.perf_counter() - begin, time.process_time() - begin_processor
    last = losses[-max(1, steps // 20) :]
    return Outcome(model.eval(), averaged.module.eval(), {}, sum(last) / len(last), seconds, processor)


def figures(outcome: Outcome, data: Set, settings: Settings) -> dict[str, Any]:
    """Scores of the network on the test images, and its cost for one image of the crop's size.

    Bytes of activations are those of torch's own modules, also where norms computed their activations.
    """
    test = data.load()[1]
    last = score(outcome.model, test, data.classes, data.void)
    mean = score(outcome.averaged, test, data.classes, data.void)
    graph = graph_of(settings)
    if outcome.widths:
        sizes = np.array([outcome.widths[group.name] for group in graph.groups])
        cost = graph.cost(widths.first_channels(graph, sizes))
    else:
        graph = sparsekern.trace(outcome.model, example(settings))
        cost = graph.cost(np.ones(graph.num_channels, bool))
    return {
        "dice": last.dice,
        "miou": last.miou,
        "averaged_dice": mean.dice,
        "averaged_miou": mean.miou,
        "parameters": parameters(outcome.model),
        "macs": cost.macs,
        "activation_bytes": cost.activations,
        "widths": outcome.widths,
        "loss": outcome.loss,
        "seconds": outcome.seconds,
        "processor_seconds": outcome.processor_seconds,
    }
