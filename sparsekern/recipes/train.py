"""The training loop of every recipe, dense or pruned."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .batches import Batches
from .data import Split
from .errors import InputError
from .metrics import Scores, SegmentationLoss, class_weights, count_confusion, scores
from .resume import check_settings
from .settings import Settings, build_model, build_optimizer, build_pruner

# How many points of a run's cost over time are kept.
COST_POINTS = 100


@dataclass
class History:
    """What happened, as plain lists; `step` counts from 1, after the update.

    Attributes:
        loss: of every step.
        seconds, optimizer_seconds: wall time of every step, and of `optimizer.step()` in it.
        scores: `[step, dice, miou]` of every evaluation of the validation split.
        cost: `[step, share of MACs, share of parameters]` that are not masked, of a pruned run.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    cost: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What a progress callback is told after every step.

    Attributes:
        step: steps done. loss: of this step. macs_share: not masked yet, 1 for a dense run.
        scores: of the last evaluation, None before the first. evaluated: it came after this step.
    """

    step: int
    loss: float
    macs_share: float
    scores: Scores | None
    evaluated: bool = False


def learning_rate(step: int, *, steps: int, warmup: float) -> float:
    """Factor on the rate in `step` (from 0): linear rise over `warmup * steps`, cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Trainer:
    """A run that can stop after any step and go on from its `state_dict`, bit for bit.

    Args:
        settings: what to train, and how.
        train: the images to train on; those smaller than the crop are padded with void.
        val: the images that are scored meanwhile; None for no scores.
        backbone: weights for the backbone of MobileNetV3.

    Attributes:
        model: the network; masked while it is pruned, and smaller from then on with `settings.shrink`.
        pruner: None for a dense run.
        example: float32 `[1, 3, crop, crop]`, the first training image, cut to the crop.
        step: steps done. history: what happened in them.

    Raises:
        InputError: `backbone` does not fit.
        ValueError: the budget cannot be met (from `Pruner`).
    """

    def __init__(
        self,
        settings: Settings,
        train: Split,
        val: Split | None = None,
        *,
        backbone: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.val = val
        self.batches = Batches(train.padded(settings.crop), settings.batch, settings.crop, settings.seed)
        self.criterion = SegmentationLoss(
            class_weights(settings.class_weights, train.pixel_counts(settings.classes)),
            void=self.batches.split.has_void,
        )
        self.example = self.batches(0)[0][:1]
        self.model = build_model(settings, backbone)
        self._shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        # oneDNN convolves this layout a quarter faster than the default one.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = build_optimizer(self.model, settings)
        self.pruner = build_pruner(self.model, self.optimizer, self.example, settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            partial(learning_rate, steps=settings.steps, warmup=settings.warmup),
        )
        self.step = 0
        self.history = History()
        self._data = [None if split is None else _checksum(split) for split in (train, val)]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.settings.steps

    def run(
        self,
        stop: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains until `stop` steps are done, by default all of them, or a step after `asked()` is true.

        `on_step` is called after every step, when a checkpoint may be taken.
        """
        stop = self.settings.steps if stop is None else min(stop, self.settings.steps)
        criterion, optimizer, history = self.criterion, self.optimizer, self.history
        if self.step:
            # A run that was stopped in an evaluation takes it before it goes on.
            self._observe(asked)
        self.model.train()
        begin = perf_counter()
        for x, y in self.batches.steps(self.step, stop):
            loss = criterion(self.model(x.to(memory_format=torch.channels_last)), y)
            loss.backward()
            before = perf_counter()
            optimizer.step()
            after = perf_counter()
            optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1
            history.loss.append(loss.item())
            history.optimizer_seconds.append(after - before)
            history.seconds.append(perf_counter() - begin)
            self._observe(asked)
            if on_step is not None:
                on_step(self._report())
            if asked():
                break
            begin = perf_counter()

    def _observe(self, asked: Callable[[], bool]) -> None:
        """Cost and scores, where they are due and not there yet; their time is not that of a step."""
        steps, history = self.settings.steps, self.history
        if self.pruner is not None and self._lacks(history.cost) and _due(self.step, steps, COST_POINTS):
            metrics = self.pruner.metrics()
            cost = [self.step, metrics["macs_share"], metrics["params_share"]]
            history.cost.append([float(value) for value in cost])
        if self.val is None or not self._lacks(history.scores):
            return
        if _due(self.step, steps, self.settings.evaluations):
            confusion = count_confusion(self.model, self.val, self.settings.classes, asked=asked)
            if confusion is not None:
                history.scores.append([float(self.step), *scores(confusion)])

    def _lacks(self, rows: list[list[float]]) -> bool:
        return not rows or rows[-1][0] < self.step

    def _report(self) -> Step:
        history = self.history
        share = history.cost[-1][1] if history.cost else 1.0
        latest = Scores(*history.scores[-1][1:]) if history.scores else None
        evaluated = not self._lacks(history.scores)
        return Step(self.step, history.loss[-1], share, latest, evaluated)

    def state_dict(self) -> dict[str, Any]:
        """All that the run depends on from here, as tensors and plain data."""
        return {
            "settings": self.settings.to_json(),
            "shapes": self._shapes,
            "data": self._data,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "random": torch.get_rng_state(),
            "history": asdict(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the run of `state` was.

        This run may have more steps than that of `state`. The rate then follows the longer schedule from
        here on; what becomes of the pruning, `Pruner.load_state_dict` tells.

        Raises:
            InputError: `state` is of other settings, another network or other data; nothing has
                changed then.
        """
        self._check(state)
        if self.pruner is not None:
            # First, as it brings the other two to the size that they had.
            self.pruner.load_state_dict(state["pruner"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["settings"]["steps"] != self.settings.steps:
            self._set_rate(state["step"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        self.history = History(**state["history"])

    def _set_rate(self, step: int) -> None:
        """The rate of `step` on this run's schedule: the one loaded was on a shorter schedule."""
        factor = learning_rate(step, steps=self.settings.steps, warmup=self.settings.warmup)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * factor

    def _check(self, state: Mapping[str, Any]) -> None:
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise InputError(f"--resume: the checkpoint lacks {missing[0]!r}; expected one of a run")
        check_settings(self.settings, Settings.from_json(state["settings"]))
        shapes = self._shapes
        for name in sorted(shapes.keys() | state["shapes"].keys()):
            here, there = shapes.get(name), state["shapes"].get(name)
            if here != there:
                raise InputError(
                    f"--resume: the checkpoint is of another network; {name} is {there} there, "
                    f"expected {here}"
                )
        if state["data"] != self._data:
            raise InputError("--resume: the checkpoint is of other images; expected the same --data")


def _due(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of `times` evenly spread over `steps`, the last one among them."""
    return step * times // steps > (step - 1) * times // steps


def _checksum(split: Split) -> int:
    return zlib.crc32(split.labels.tobytes(), zlib.crc32(split.pixels.tobytes()))
