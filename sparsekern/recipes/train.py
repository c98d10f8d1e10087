"""The training loop of every recipe, dense or pruned."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sparsekern.files.schema import Anything, Fields, Items, Kind, OneOf, Whole, like
from sparsekern.prune.pruner import check_run
from sparsekern.prune.save.check import check_training
from sparsekern.prune.save.checkpoint import in_own_memory
from sparsekern.prune.state.future import Future
from sparsekern.prune.state.schema import STATE
from sparsekern.recipes.batches import Batches
from sparsekern.recipes.checkpoint import RUN
from sparsekern.recipes.data import Split
from sparsekern.recipes.devices import autocast, find_device, grad_scaler
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.metrics import Scores, SegmentationLoss, class_weights, count_confusion, scores
from sparsekern.recipes.resume import check_settings
from sparsekern.recipes.settings import Settings, build_model, build_optimizer, build_pruner

# Number of recorded points of a run's cost over time.
COST_POINTS = 100
# Steps between two reads of the losses from a GPU.
READ_EVERY = 20


@dataclass
class History:
    """Records of a run as plain lists; `step` counts completed updates from 1.

    Attributes:
        loss: loss of every step.
        seconds, optimizer_seconds: wall time of every step and of its `optimizer.step()`, in seconds.
        scores: `[step, dice, miou]` of every evaluation of the validation split.
        cost: `[step, share of MACs, share of parameters]` that are not masked, in a pruned run.
    """

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    cost: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """The argument of a progress callback after every step.

    Attributes:
        step: number of completed steps.
        loss: loss of this step; on a GPU the latest loss that was read.
        macs_share: share of the MACs that are not masked; 1 for a dense run.
        scores: scores of the last evaluation; None before the first one.
        evaluated: whether the last evaluation came after this step.
    """

    step: int
    loss: float
    macs_share: float
    scores: Scores | None
    evaluated: bool = False


def learning_rate(step: int, *, steps: int, warmup: float) -> float:
    """Factor of the learning rate in `step` (from 0): linear over `warmup * steps`, then cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Trainer:
    """A run that can stop after any step and be resumed from its `state_dict`, bit for bit.

    Args:
        settings: settings of the run.
        train: training images; images smaller than the crop are padded with void.
        val: validation images, scored during the training; None for no scores.
        backbone: weights for the backbone of MobileNetV3.

    Attributes:
        model: the network; pruning masks its channels, and with `settings.shrink` also removes them.
        pruner: the pruner; None for a dense run.
        device: device of network and training.
        example: float32 `[1, 3, crop, crop]`, the first image of the first batch.
        step: number of completed steps.
        history: records of the completed steps.

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
        self.device = find_device(settings.device)
        self.settings = settings
        self.val = val
        self.batches = Batches(train.padded(settings.crop), settings.batch, settings.crop, settings.seed)
        self.criterion = SegmentationLoss(
            class_weights(settings.class_weights, train.pixel_counts(settings.classes)),
            void=self.batches.split.has_void,
        ).to(self.device)
        self.example = self.batches(0)[0][:1].to(self.device)
        self.model = build_model(settings, backbone)
        self._shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        # oneDNN convolves this memory format 25 % faster than the default one.
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scaler = grad_scaler(self.device, settings.amp)
        self.optimizer = build_optimizer(self.model, settings)
        self.pruner = build_pruner(self.model, self.optimizer, self.example, settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            partial(learning_rate, steps=settings.steps, warmup=settings.lr_warmup),
        )
        self.step = 0
        self.history = History()
        self._losses: list[Tensor] = []
        self._read_every = 1 if self.device.type == "cpu" else READ_EVERY
        self._data = [None if split is None else _checksum(split) for split in (train, val)]

    @property
    def finished(self) -> bool:
        """Whether all steps are completed."""
        return self.step >= self.settings.steps

    def run(
        self,
        stop: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until `stop` steps are completed or `asked()` is true after a step.

        Args:
            stop: number of completed steps at which to stop; None for all steps.
            on_step: called after every step; it may save a checkpoint.
            asked: returns whether to stop after the current step.
        """
        stop = self.settings.steps if stop is None else min(stop, self.settings.steps)
        if self.step:
            # A run that was stopped during an evaluation repeats the evaluation first.
            self._observe(asked)
        self.model.train()
        begin = perf_counter()
        for x, y in self.batches.steps(self.step, stop):
            loss, seconds = self._update(x, y)
            self.step += 1
            self._losses.append(loss)
            if len(self._losses) >= self._read_every or self.step == stop:
                self._read_losses()
            self.history.optimizer_seconds.append(seconds)
            self.history.seconds.append(perf_counter() - begin)
            self._observe(asked)
            if on_step is not None:
                on_step(self._report())
            if asked():
                break
            begin = perf_counter()

    def _read_losses(self) -> None:
        """Copy the losses to the CPU; this waits for the GPU."""
        if self._losses:
            self.history.loss += torch.stack(self._losses).tolist()
            self._losses.clear()

    def _update(self, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """Train one step on a batch.

        Returns:
            The loss, and the wall time of the optimizer in seconds.
        """
        x = x.to(self.device, memory_format=torch.channels_last)
        with autocast(self.device, self.settings.amp):
            logits = self.model(x)
        # The loss is in float32, as sums over all pixels of a batch overflow float16.
        loss = self.criterion(logits.float(), y.to(self.device))
        self.scaler.scale(loss).backward()
        before = perf_counter()
        self.scaler.step(self.optimizer)
        seconds = perf_counter() - before
        self.scaler.update()
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            # The scaler may skip the first steps; the learning rate still follows the number of batches.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
            self.scheduler.step()
        return loss.detach(), seconds

    def _observe(self, asked: Callable[[], bool]) -> None:
        """Record cost and scores that are due and missing; step times do not include this."""
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
        loss = history.loss[-1] if history.loss else math.nan
        evaluated = not self._lacks(history.scores)
        return Step(self.step, loss, share, latest, evaluated)

    def state_dict(self) -> dict[str, Any]:
        """The whole state of the run, as tensors and plain data."""
        self._read_losses()
        return {
            "settings": self.settings.to_json(),
            "shapes": self._shapes,
            "data": self._data,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "pruner": None if self.pruner is None else self.pruner.state_dict(),
            "random": torch.get_rng_state(),
            "history": asdict(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run of `state`.

        This run may have more steps than that of `state`. The learning rate then follows the longer schedule
        from the next step on; `Pruner.load_state_dict` describes the effect on pruning.

        Raises:
            InputError: `state` has other settings, another network or other data; nothing is changed.
        """
        self._check(state)
        if self.pruner is not None:
            # The pruner loads first, as it cuts model and optimizer to their saved sizes.
            self.pruner.load_state_dict(state["pruner"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(in_own_memory(state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if state["settings"]["steps"] != self.settings.steps:
            self._set_rate(state["step"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        self._losses.clear()
        self.history = History(**state["history"])

    def _set_rate(self, step: int) -> None:
        """Set the rate of `step` by this run's schedule, as the loaded rate is from a shorter one."""
        factor = learning_rate(step, steps=self.settings.steps, warmup=self.settings.lr_warmup)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * factor

    def _check(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise InputError(f"--resume: the checkpoint lacks {missing[0]!r}; expected one of a run")
        try:
            RUN.check(state, "state")
        except ValueError as error:
            raise InputError(f"--resume: {error}; the checkpoint is damaged or was changed") from None
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
        try:
            self._check_parts(state, own)
        except ValueError as error:
            raise InputError(f"--resume: {error}; the checkpoint is damaged or was changed") from None

    def _check_parts(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Check that every part of the run can load its part of `state`.

        Raises:
            ValueError: a part cannot be loaded; nothing is changed.
        """
        done = OneOf((state["step"],))
        parts = {name: Anything() for name in own}
        Fields(parts, {"remembered": Anything()}).check(state, "state")
        Whole(0, self.settings.steps).check(state["step"], "state['step']")
        history = {name: Items(Anything()) for name in own["history"]}
        per_step = {name: Items(Kind(float), length=state["step"]) for name in ("loss", "seconds")}
        Fields({**history, **per_step}).check(state["history"], "state['history']")
        scheduler = {name: like(value) for name, value in own["scheduler"].items()}
        Fields({**scheduler, "last_epoch": done}).check(state["scheduler"], "state['scheduler']")
        scaler = {name: like(value) for name, value in own["scaler"].items()}
        Fields(scaler).check(state["scaler"], "state['scaler']")
        if self.pruner is not None:
            STATE.check(state["pruner"], "state['pruner']")
            check_run(self.pruner, state["pruner"], state["model"], state["optimizer"])
        else:
            OneOf((None,)).check(state["pruner"], "state['pruner']")
            check_training(state["model"], state["optimizer"], self.model, self.optimizer, Future())


def _due(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of `times` evenly spaced steps out of `steps`, which include the last step."""
    return step * times // steps > (step - 1) * times // steps


def _checksum(split: Split) -> int:
    return zlib.crc32(split.labels.tobytes(), zlib.crc32(split.pixels.tobytes()))
