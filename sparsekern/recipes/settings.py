"""The settings of a training run, and the network, optimizer and pruner that they define."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsekern
from sparsekern import criteria
from sparsekern.prune.decide.budget import UNITS, check_keep, check_unit
from sparsekern.prune.decide.names import ALLOCATORS, resolve_select
from sparsekern.prune.schedule import Schedule
from sparsekern.recipes.data import MEAN, STD
from sparsekern.recipes.devices import AMP
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.metrics import class_weights
from sparsekern.recipes.networks import MODELS as MODELS
from sparsekern.recipes.networks import NetworkSpec, Reading
from sparsekern.runtimes import RUNTIMES, check_runtime


def _option(default: Any, help: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A field of `Settings` that is also an option of the command line.

    Args:
        default: default of field and option.
        help: help text of the option, which also documents the field.
        parse: converts a text to the value, where the type of the field does not determine this.
    """
    return field(default=default, metadata={"help": help, "parse": parse})


def _number_or_text(text: str) -> int | str:
    """A whole number as int, any other text unchanged; `Settings` checks it."""
    return int(text) if text.isdecimal() else text


@dataclass(frozen=True)
class Settings:
    """Settings of a run. On one machine, equal settings and data give the same network bit for bit.

    Every field is an option of `sparsekern train` with the same help text. Arguments of
    :class:`sparsekern.Pruner` have the same names and defaults here.

    Raises:
        InputError: a value is out of range; the error names the argument.
    """

    model: str = _option("unet", "unet, mobilenetv3, mobilenetv3-small")
    width: float | None = _option(None, "UNet: first channels (32); MobileNetV3: factor (1).")
    depth: int = _option(4, "UNet: number of poolings.")
    decoder: str = _option("transposed", "UNet: transposed, bilinear")
    classes: int = _option(2, "Classes of the masks with the background; default 2.")
    keep: float | None = _option(0.2, "Share of the cost that stays, in (0, 1]; default 0.2.")
    of: str = _option("macs", "The cost: macs, params, latency")
    runtime: str = _option("torch", "Where --of latency is measured: torch, compile, onnxruntime, openvino")
    select: str = _option(
        "joint",
        "Which channels go: joint, taylor, gradient-count, magnitude, redundancy, random, shuffled; combined "
        "by * and +.",
    )
    allocate: str = _option("global", "How wide layers stay: global, uniform, flat")
    round_to: int | str | None = _option(
        None,
        "Channel counts become multiples of it; a number or auto; default 1, with --shrink auto.",
        _number_or_text,
    )
    min_channels: int = _option(1, "Every layer keeps so many.")
    warmup: float = _option(0.1, "Share of the steps before the first channel goes.")
    finish: float = _option(0.6, "Share of the steps by which the budget is met.")
    events: int = _option(10, "How many times channels go.")
    shrink: bool = _option(False, "Make the network smaller during the training, which gets cheaper by it.")
    steps: int = _option(1000, "Optimizer steps.")
    batch: int = _option(8, "Images a step.")
    crop: int = _option(128, "Pixels an edge that a step sees of an image.")
    lr: float = _option(1e-3, "Highest learning rate.")
    weight_decay: float = _option(1e-2, "Of AdamW.")
    lr_warmup: float = _option(
        0.05, "Share of the steps in which lr rises; it falls along a cosine from there to zero."
    )
    seed: int = _option(0, "Of weights, order and augmentation.")
    evaluations: int = _option(5, "How often the validation images are scored.")
    ignore: int | str = _option(
        "auto",
        "Mask value that counts for nothing (void); auto: 255 beside more than 2 classes; none.",
        _number_or_text,
    )
    class_weights: str | None = _option(None, "On the cross entropy: balanced, or a number a class, 1,2.5,2.")
    validation: float = _option(
        0.1, "Share of the training images that is scored meanwhile, without val/; 0 for none."
    )
    device: str = _option("cpu", "Where to train: cpu, cuda, cuda:1, mps")
    amp: str = _option("none", "Mixed precision of the training: none, bf16, fp16 (with a GradScaler).")

    def __post_init__(self) -> None:
        _one_of("of", self.of, UNITS)
        _one_of("runtime", self.runtime, RUNTIMES)
        _one_of("allocate", self.allocate, tuple(ALLOCATORS))
        _one_of("amp", self.amp, tuple(AMP))
        parse_select(self.select)
        self.network()
        for name in ("steps", "batch", "min_channels", "events", "evaluations"):
            _at_least(name, getattr(self, name), 1)
        _number("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        _number("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _number("lr_warmup", self.lr_warmup, 0 <= self.lr_warmup < 1, "a share in [0, 1)")
        _number("warmup", self.warmup, 0 <= self.warmup < 1, "a share in [0, 1)")
        expected = f"a share above --warmup ({self.warmup}), at most 1"
        _number("finish", self.finish, self.warmup < self.finish <= 1, expected)
        round_to = self.round_to
        fits = round_to in (None, "auto") or (isinstance(round_to, int) and round_to >= 1)
        _number("round_to", round_to, fits, "a whole number, at least 1, or auto")
        class_weights(self.class_weights, np.ones(self.classes, np.int64))
        if self.keep is not None:
            self._check_budget()

    def _check_budget(self) -> None:
        """Check the arguments of the Pruner that do not depend on the network.

        Raises:
            InputError: an argument is out of range.
        """
        try:
            keep = check_keep(self.keep)
            schedule = {name: getattr(self, name) for name in ("steps", "warmup", "finish", "events")}
            Schedule.cubic(keep=keep, **schedule)
        except ValueError as error:
            raise InputError(f"--{error}") from None

    def network(self, bits: int | None = None) -> NetworkSpec:
        """The description of the trained network; `bits` is `Data.bits`."""
        reading = Reading(bits, self.ignore, self.validation, self.seed, self.crop)
        return NetworkSpec(self.model, self.width, self.depth, self.decoder, self.classes, MEAN, STD, reading)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """The inverse of `to_json`, also for data of earlier versions; missing fields have their defaults.

        Earlier versions had fewer fields and two other names.

        Raises:
            InputError: a setting is unknown or out of range.
        """
        values = dict(data)
        if "begin" in values:
            values["lr_warmup"], values["warmup"] = values.get("warmup", 0.05), values.pop("begin")
        unknown = sorted(values.keys() - {entry.name for entry in fields(cls)})
        if unknown:
            raise InputError(
                f"--resume: the run has the setting {unknown[0]!r}, which this version does not know; "
                f"expected a run of this version"
            )
        return cls(**values)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"--{_spelled(name)}: got {value!r}, expected one of {', '.join(choices)}")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise InputError(f"--{_spelled(name)}: got {value!r}, expected a whole number, at least {least}")


def _number(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"--{_spelled(name)}: got {value!r}, expected {expected}")


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def parse_select(text: str) -> criteria.Criterion:
    """A criterion from names joined by `*` and `+`, such as `taylor*gradient-count`; `*` binds tighter.

    Raises:
        InputError: a name is unknown.
    """
    try:
        return resolve_select(text)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def build_model(settings: Settings, backbone: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network of `settings` at full size, with random weights from its seed.

    Args:
        settings: settings of the run.
        backbone: weights for the backbone of MobileNetV3.

    Raises:
        InputError: `backbone` does not fit the network.
    """
    torch.manual_seed(settings.seed)
    return settings.network().build(backbone)


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """sparsekern's AdamW for a pruned run, torch's fused AdamW for a dense run."""
    lr, decay, weights = settings.lr, settings.weight_decay, model.parameters()
    if settings.keep is None:
        return torch.optim.AdamW(weights, lr=lr, weight_decay=decay, fused=True)
    return sparsekern.optim.AdamW(weights, lr=lr, weight_decay=decay)


def build_pruner(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor, settings: Settings
) -> sparsekern.Pruner | None:
    """The pruner of a run; None for a dense run.

    Raises:
        ValueError: `keep`, `round_to` or `min_channels` cannot be met (from `Pruner`).
    """
    if settings.keep is None:
        return None
    return sparsekern.Pruner(
        model,
        optimizer,
        example,
        keep=settings.keep,
        of=check_unit(settings.of, settings.runtime),
        runtime=check_runtime(settings.runtime),
        steps=settings.steps,
        select=parse_select(settings.select),
        allocate=ALLOCATORS[settings.allocate](),
        round_to=settings.round_to,
        min_channels=settings.min_channels,
        warmup=settings.warmup,
        finish=settings.finish,
        events=settings.events,
        shrink=settings.shrink,
    )
