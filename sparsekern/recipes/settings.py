"""What a training run depends on, and the network, optimizer and pruner that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern
from sparsekern import criteria
from sparsekern.prune.budget import UNITS, check_unit
from sparsekern.prune.names import ALLOCATORS, resolve_select

from .errors import InputError
from .metrics import output_channels
from .models import UNet, lraspp_mobilenetv3
from .models.mobilenetv3 import Variant
from .models.unet import Decoder

VARIANTS: Mapping[str, Variant] = {"mobilenetv3": "large", "mobilenetv3-small": "small"}
MODELS = ("unet", *VARIANTS)
# The strongest reduction of resolution among the models; smaller images have no pixel left there.
COARSEST = 32


@dataclass(frozen=True)
class Settings:
    """Arguments of a run; on one machine, equal settings and data give equal networks, bit for bit.

    Attributes:
        model: one of `MODELS`.
        width: channels of the UNet at full resolution (default 32), or the factor on the channels of
            MobileNetV3 (default 1).
        depth, decoder: of the UNet.
        classes: of the masks, background included.
        keep: share of the cost that stays; None trains without pruning.
        of: the cost, `"macs"`, `"params"` or `"latency"`.
        select: which channels go; names of `CRITERIA` joined by `*` and `+`.
        allocate: how wide layers stay; a name of `ALLOCATORS`.
        round_to: channel counts become multiples of it; `"auto"` takes what suits the device, None is
            `"auto"` with `shrink`, else 1.
        min_channels: every layer keeps so many.
        begin, finish, events: channels go at so many events from the share `begin` of the steps on, and the
            budget is met at the share `finish` of them.
        shrink: the network gets smaller while it is trained, not only at the end.
        steps, batch, crop: optimizer steps, images a step, their height and width in pixels.
        lr, weight_decay, warmup: of AdamW; the rate rises over the share `warmup` of the steps, then
            falls along a cosine to zero.
        seed: of weights, order and augmentation.
        evaluations: how often the test split is scored, the end included.

    Raises:
        InputError: a value is out of range; names the argument.
    """

    model: str = "unet"
    width: float | None = None
    depth: int = 4
    decoder: Decoder = "transposed"
    classes: int = 2
    keep: float | None = 0.2
    of: str = "macs"
    select: str = "joint"
    allocate: str = "global"
    round_to: int | str | None = None
    min_channels: int = 1
    begin: float = 0.1
    finish: float = 0.6
    events: int = 10
    shrink: bool = False
    steps: int = 1000
    batch: int = 8
    crop: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.05
    seed: int = 0
    evaluations: int = 5

    def __post_init__(self) -> None:
        _one_of("model", self.model, MODELS)
        _one_of("decoder", self.decoder, ("transposed", "bilinear"))
        _one_of("of", self.of, UNITS)
        _one_of("allocate", self.allocate, tuple(ALLOCATORS))
        parse_select(self.select)
        for name, least in (("depth", 1), ("steps", 1), ("batch", 1), ("seed", 0)):
            _at_least(name, getattr(self, name), least)
        _at_least("classes", self.classes, 2)
        _at_least("crop", self.crop, COARSEST)
        _at_least("min-channels", self.min_channels, 1)
        _at_least("evaluations", self.evaluations, 1)
        if self.classes > 256:
            raise InputError(f"--classes: got {self.classes}, expected at most 256 (8-bit masks)")
        if not self.lr > 0:
            raise InputError(f"--lr: got {self.lr}, expected a positive number")
        if not self.weight_decay >= 0:
            raise InputError(f"--weight-decay: got {self.weight_decay}, expected 0 or more")
        if not 0 <= self.warmup < 1:
            raise InputError(f"--warmup: got {self.warmup}, expected a share in [0, 1)")
        if self.width is not None and not self.width > 0:
            raise InputError(f"--width: got {self.width}, expected a positive number")
        if self.model == "unet" and self.width is not None and self.width != int(self.width):
            raise InputError(f"--width: got {self.width}, expected a whole number for the UNet")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"--{name}: got {value!r}, expected one of {', '.join(choices)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"--{name}: got {value}, expected at least {least}")


def parse_select(text: str) -> criteria.Criterion:
    """A criterion from names joined by `*` (binds tighter) and `+`, such as `taylor*gradient-count`.

    Raises:
        InputError: an unknown name.
    """
    try:
        return resolve_select(text)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def build_model(settings: Settings, backbone: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The network of `settings` at full size, with weights of its seed.

    Args:
        settings: what to build.
        backbone: weights for the backbone of MobileNetV3.

    Raises:
        InputError: `backbone` does not belong to the network.
    """
    torch.manual_seed(settings.seed)
    channels = output_channels(settings.classes)
    if settings.model == "unet":
        if backbone is not None:
            raise InputError("--backbone is for mobilenetv3; expected none with --model unet")
        width = int(settings.width or 32)
        return UNet(3, channels, width=width, depth=settings.depth, decoder=settings.decoder)
    variant = VARIANTS[settings.model]
    try:
        return lraspp_mobilenetv3(
            variant,
            classes=channels,
            multiplier=settings.width or 1.0,
            backbone_weights=backbone,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(
            f"--backbone does not fit --model {settings.model} ({reason}); expected the state dict of "
            f"torchvision's mobilenet_v3_{variant}"
        ) from error


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Our AdamW for a pruned run, torch's fastest for a dense one."""
    lr, decay, weights = settings.lr, settings.weight_decay, model.parameters()
    if settings.keep is None:
        return torch.optim.AdamW(weights, lr=lr, weight_decay=decay, fused=True)
    return sparsekern.optim.AdamW(weights, lr=lr, weight_decay=decay)


def build_pruner(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor, settings: Settings
) -> sparsekern.Pruner | None:
    """The pruner of a run, or None for a dense one.

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
        of=check_unit(settings.of),
        steps=settings.steps,
        select=parse_select(settings.select),
        allocate=ALLOCATORS[settings.allocate](),
        round_to=settings.round_to,
        min_channels=settings.min_channels,
        warmup=settings.begin,
        finish=settings.finish,
        events=settings.events,
        shrink=settings.shrink,
    )
