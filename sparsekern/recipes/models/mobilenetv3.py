"""MobileNetV3 feature extractor (Howard et al. 2019).

Module names equal those of `torchvision.models.mobilenet_v3_*().features`, so its weights can be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor, nn

Variant = Literal["large", "small"]

# The eps of the published networks. Their momentum of 0.01 is meant for trainings of 10^5 steps. After 250
# steps it gave useless running statistics (Dice 0.00); torch's default of 0.1 gave a Dice of 0.81 with the
# same weights.
BatchNorm = partial(nn.BatchNorm2d, eps=1e-3)


class Block(NamedTuple):
    """One line of the paper's tables 1 and 2."""

    kernel: int
    expanded: int
    out: int
    squeeze: bool
    hard_swish: bool
    stride: int
    last_stage: bool = False  # dilated instead of strided when `dilated=True`


STEM = 16
BLOCKS: Mapping[Variant, tuple[Block, ...]] = {
    "large": (
        Block(3, 16, 16, False, False, 1),
        Block(3, 64, 24, False, False, 2),
        Block(3, 72, 24, False, False, 1),
        Block(5, 72, 40, True, False, 2),
        Block(5, 120, 40, True, False, 1),
        Block(5, 120, 40, True, False, 1),
        Block(3, 240, 80, False, True, 2),
        Block(3, 200, 80, False, True, 1),
        Block(3, 184, 80, False, True, 1),
        Block(3, 184, 80, False, True, 1),
        Block(3, 480, 112, True, True, 1),
        Block(3, 672, 112, True, True, 1),
        Block(5, 672, 160, True, True, 2, last_stage=True),
        Block(5, 960, 160, True, True, 1, last_stage=True),
        Block(5, 960, 160, True, True, 1, last_stage=True),
    ),
    "small": (
        Block(3, 16, 16, True, False, 2),
        Block(3, 72, 24, False, False, 2),
        Block(3, 88, 24, False, False, 1),
        Block(5, 96, 40, True, True, 2),
        Block(5, 240, 40, True, True, 1),
        Block(5, 240, 40, True, True, 1),
        Block(5, 120, 48, True, True, 1),
        Block(5, 144, 48, True, True, 1),
        Block(5, 288, 96, True, True, 2, last_stage=True),
        Block(5, 576, 96, True, True, 1, last_stage=True),
        Block(5, 576, 96, True, True, 1, last_stage=True),
    ),
}


def round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is not more than 10 % below `channels`, at least 8."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class ConvNormAct(nn.Sequential):
    """Convolution without bias, same padding -> batch norm -> activation, if one is given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: type[nn.ReLU] | type[nn.Hardswish] | None,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel,
                stride=stride,
                padding=(kernel - 1) // 2 * dilation,
                dilation=dilation,
                groups=groups,
                bias=False,
            ),
            BatchNorm(out_channels),
        )
        if activation is not None:
            self.append(activation(inplace=True))


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate in [0, 1], computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = round_channels(channels // 4)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


class InvertedResidual(nn.Module):
    """Expand 1x1 -> depthwise -> squeeze and excite -> project 1x1, plus the input if shapes are equal."""

    def __init__(self, in_channels: int, block: Block, multiplier: float, dilation: int) -> None:
        super().__init__()
        expanded = round_channels(block.expanded * multiplier)
        out_channels = round_channels(block.out * multiplier)
        activation = nn.Hardswish if block.hard_swish else nn.ReLU
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(ConvNormAct(in_channels, expanded, 1, activation=activation))
        layers.append(
            ConvNormAct(
                expanded,
                expanded,
                block.kernel,
                stride=block.stride if dilation == 1 else 1,
                dilation=dilation,
                groups=expanded,
                activation=activation,
            )
        )
        if block.squeeze:
            layers.append(SqueezeExcitation(expanded))
        layers.append(ConvNormAct(expanded, out_channels, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.residual = block.stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + x if self.residual else y


class MobileNetV3Features(nn.Sequential):
    """The layers of MobileNetV3 before the pooling and the classifier.

    Args:
        variant: `"large"` or `"small"`.
        multiplier: scales all channel counts, which are rounded to multiples of 8.
        dilated: whether the last stage uses dilation instead of a stride, as segmentation does. The output
            then has a stride of 16 pixels instead of 32.

    Attributes:
        low: index of the layer whose output has a stride of 8 pixels.
        high: index of the last layer.
        low_channels, high_channels: numbers of channels of the two outputs.

    Shapes: float `[N, 3, H, W]` to `[N, high_channels, ceil(H / 32), ceil(W / 32)]`.

    Raises:
        ValueError: unknown variant, or a multiplier that is not positive.
    """

    def __init__(self, variant: Variant = "large", *, multiplier: float = 1.0, dilated: bool = False) -> None:
        if variant not in BLOCKS:
            raise ValueError(f"variant: got {variant!r}, expected 'large' or 'small'")
        if not multiplier > 0:
            raise ValueError(f"multiplier: got {multiplier}, expected a number > 0")
        channels = round_channels(STEM * multiplier)
        layers: list[nn.Module] = [ConvNormAct(3, channels, 3, stride=2, activation=nn.Hardswish)]
        strided = [0]
        widths = [channels]
        for block in BLOCKS[variant]:
            dilation = 2 if dilated and block.last_stage else 1
            if block.stride > 1:
                strided.append(len(layers))
            layers.append(InvertedResidual(channels, block, multiplier, dilation))
            channels = round_channels(block.out * multiplier)
            widths.append(channels)
        layers.append(ConvNormAct(channels, 6 * channels, 1, activation=nn.Hardswish))
        super().__init__(*layers)
        self.low, self.high = strided[-3], len(layers) - 1
        self.low_channels, self.high_channels = widths[self.low], 6 * channels
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def low_and_high(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of layers `low` and `high`."""
        low = x
        for index, layer in enumerate(self):
            x = layer(x)
            if index == self.low:
                low = x
        return low, x
