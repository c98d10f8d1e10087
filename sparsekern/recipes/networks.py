"""The networks of the recipes by name, built from plain data in a model file.

The module needs no extras beside torch, so `sparsekern.load` works where none are installed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.recipes.data import COARSEST, VOID
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.models import UNet, lraspp_mobilenetv3
from sparsekern.recipes.models.mobilenetv3 import Variant
from sparsekern.recipes.models.unet import Decoder

VARIANTS: Mapping[str, Variant] = {"mobilenetv3": "large", "mobilenetv3-small": "small"}
MODELS = ("unet", *VARIANTS)
DECODERS = ("transposed", "bilinear")

# A label has 8 bits, and one label is void. A mask value has at most 16 bits.
MAX_CLASSES, MAX_VALUE = VOID, 65535
# Limits far above any network that can be trained; a file that exceeds them is damaged or hostile.
MAX_CHANNELS, MAX_DEPTH, MAX_FACTOR = 1 << 16, 12, 64.0


def output_channels(classes: int) -> int:
    """Number of logits per pixel: one for foreground and background, else one per class."""
    return 1 if classes == 2 else classes


@dataclass(frozen=True)
class Reading:
    """How images and masks of a training were read; images that are scored later must be read alike.

    Attributes:
        bits: significant bits of 16-bit grey images, 8 to 16; None for a training without such images.
        ignore, validation, seed, crop: as in `Settings`.

    Raises:
        InputError: a value is out of range; names the argument.
    """

    bits: int | None = None
    ignore: int | str = "auto"
    validation: float = 0.1
    seed: int = 0
    crop: int = COARSEST

    def __post_init__(self) -> None:
        _check(self.bits is None or _whole(self.bits, 8, 16), "bits", self.bits, "8 to 16, or none")
        known = self.ignore in ("auto", "none") or _whole(self.ignore, 0, MAX_VALUE)
        _check(known, "ignore", self.ignore, f"auto, none, or a mask value 0 to {MAX_VALUE}")
        share = _finite(self.validation) and 0 <= self.validation < 1
        _check(share, "validation", self.validation, "a share in [0, 1)")
        _check(_whole(self.seed, 0, sys.maxsize), "seed", self.seed, "a whole number, at least 0")
        least = f"a whole number, at least {COARSEST}"
        _check(_whole(self.crop, COARSEST, sys.maxsize), "crop", self.crop, least)


@dataclass(frozen=True)
class NetworkSpec:
    """A network of the recipes, with the normalisation of its input and the meaning of its output.

    Attributes:
        model: one of `MODELS`.
        width: channels of the UNet at full resolution (None: 32), or the factor on the channels of
            MobileNetV3 (None: 1).
        depth, decoder: depth and decoder of the UNet.
        classes: number of classes, background included; 2 to 255.
        mean, std: mean and standard deviation of the red, green and blue input channel, on the scale [0, 1].
        reading: how the files of the training were read.

    Raises:
        InputError: a value is out of range; names the argument.
    """

    model: str
    width: float | None
    depth: int
    decoder: str
    classes: int
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        _check(self.model in MODELS, "model", self.model, f"one of {', '.join(MODELS)}")
        _check(self.decoder in DECODERS, "decoder", self.decoder, f"one of {', '.join(DECODERS)}")
        _check(_whole(self.depth, 1, MAX_DEPTH), "depth", self.depth, f"at least 1 and at most {MAX_DEPTH}")
        _check(
            _whole(self.classes, 2, MAX_CLASSES),
            "classes",
            self.classes,
            f"at least 2, at most {MAX_CLASSES}",
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            _check(len(value) == 3 and all(map(_finite, value)), name, value, "3 finite numbers")
        _check(min(self.std) > 0, "std", self.std, "3 positive numbers")
        width = self.width
        if width is None:
            return
        _check(_finite(width) and width > 0, "width", width, "a positive number")
        if self.model == "unet":
            widest = MAX_CHANNELS >> self.depth
            _check(width == int(width), "width", width, "a whole number for the UNet")
            _check(width <= widest, "width", width, f"at most {widest} with depth {self.depth}")
        else:
            _check(width <= MAX_FACTOR, "width", width, f"at most {MAX_FACTOR:g}")

    @property
    def stride(self) -> int:
        """Stride of the coarsest features in pixels of the image."""
        return 2**self.depth if self.model == "unet" else COARSEST

    def build(self, backbone: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The network at full size with random weights; `backbone` gives the weights of its backbone.

        Raises:
            InputError: `backbone` does not fit the network.
        """
        channels = output_channels(self.classes)
        if self.model == "unet":
            if backbone is not None:
                raise InputError("--backbone: got one with --model unet, expected none or mobilenetv3")
            decoder = cast(Decoder, self.decoder)
            return UNet(3, channels, width=int(self.width or 32), depth=self.depth, decoder=decoder)
        variant = VARIANTS[self.model]
        factor = self.width or 1.0
        try:
            return lraspp_mobilenetv3(variant, classes=channels, multiplier=factor, backbone_weights=backbone)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(
                f"--backbone: got weights that do not fit --model {self.model} ({reason}), expected the "
                f"state dict of torchvision's mobilenet_v3_{variant}"
            ) from error

    def __str__(self) -> str:
        """The call that makes the network, as text."""
        channels = output_channels(self.classes)
        if self.model == "unet":
            rest = f"width={int(self.width or 32)}, depth={self.depth}, decoder={self.decoder!r}"
            call = f"sparsekern.recipes.models.UNet(3, {channels}, {rest})"
        else:
            rest = f"classes={channels}, multiplier={self.width or 1.0:g}"
            call = f"sparsekern.recipes.models.lraspp_mobilenetv3({VARIANTS[self.model]!r}, {rest})"
        logits = "one logit" if channels == 1 else f"{channels} logits"
        return f"{call}, which tells {self.classes} classes apart by {logits}"

    def to_json(self, version: str) -> dict[str, Any]:
        """Plain data for a model file; `version` is the version of sparsekern, for messages."""
        return {
            "recipe": self.model,
            "settings": {"width": self.width, "depth": self.depth, "decoder": self.decoder},
            "classes": self.classes,
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "reading": asdict(self.reading),
            "sparsekern": version,
        }

    @classmethod
    def from_json(cls, data: Any) -> NetworkSpec:
        """The inverse of `to_json`. The data holds only names and numbers; no code from it is run.

        Raises:
            InputError: an entry is missing or out of range; the error names it.
        """
        try:
            settings, norm = data["settings"], data["normalisation"]
            model, classes = data["recipe"], data["classes"]
            width, depth, decoder = (settings[name] for name in ("width", "depth", "decoder"))
            mean, std = (tuple(norm[name]) for name in ("mean", "std"))
            entries = {entry.name for entry in fields(Reading)}
            reading = Reading(**{name: data["reading"][name] for name in entries})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"made_by: got an entry without {error}, expected one that a training wrote"
            ) from None
        return cls(model, width, depth, decoder, classes, mean, std, reading)


class Padded(nn.Module):
    """A segmentation network for images of any size.

    Images are padded to a multiple of the stride by repeating the edge, and logits are cut back.
    Shapes: float `[N, C, H, W]` to logits `[N, classes, H, W]`, any `H` and `W` of at least 1.

    Args:
        network: gives logits of the height and width of its input, which are multiples of `stride`.
        stride: stride of the network in pixels.
    """

    def __init__(self, network: nn.Module, stride: int) -> None:
        super().__init__()
        self.network = network
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom), mode="replicate")
        return self.network(x)[..., :height, :width]


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"--{name}: got {value!r}, expected {expected}")


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
