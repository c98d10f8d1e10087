"""UNet (Ronneberger et al. 2015) with batch normalisation and same-size convolutions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Decoder = Literal["transposed", "bilinear"]


class DoubleConv(nn.Sequential):
    """Twice (3x3 convolution -> batch norm -> ReLU), `[N, in, H, W]` to `[N, out, H, W]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UpBlock(nn.Module):
    """Doubles the resolution of `x`, appends the skip connection, and merges both.

    With `decoder="transposed"` a 2x2 transposed convolution doubles the resolution and halves the channels.
    With `"bilinear"` all channels are interpolated, and the first convolution of the merge reduces them.
    """

    def __init__(self, in_channels: int, skip_channels: int, decoder: Decoder) -> None:
        super().__init__()
        self.up: nn.Module
        if decoder == "transposed":
            self.up = nn.ConvTranspose2d(in_channels, skip_channels, 2, stride=2)
            merged = 2 * skip_channels
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            merged = in_channels + skip_channels
        self.merge = DoubleConv(merged, skip_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        rows, columns = (skip.shape[d] - x.shape[d] for d in (-2, -1))
        if rows or columns:  # pooling dropped the last line of an odd size
            x = F.pad(x, (0, columns, 0, rows), mode="replicate")
        return self.merge(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Encoder and decoder of `depth` levels below full resolution, joined by skip connections.

    Args:
        in_channels: channels of the image.
        classes: channels of the output; 1 for foreground against background (one logit per pixel).
        width: channels at full resolution; they double at every level down to `width * 2**depth`.
        depth: number of 2x2 poolings; images must be at least `2**depth` pixels in both directions.
        decoder: method of upsampling, `"transposed"` convolution or `"bilinear"` interpolation.

    Shapes: float `[N, in_channels, H, W]` to logits `[N, classes, H, W]`, any `H` and `W`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        width: int = 32,
        depth: int = 4,
        decoder: Decoder = "transposed",
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "classes": classes, "width": width, "depth": depth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected a whole number >= 1")
        if decoder not in ("transposed", "bilinear"):
            raise ValueError(f"decoder: got {decoder!r}, expected 'transposed' or 'bilinear'")
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            DoubleConv(a, b) for a, b in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.decoder = nn.ModuleList(
            UpBlock(2 * channels, channels, decoder) for channels in reversed(widths[:-1])
        )
        self.head = nn.Conv2d(width, classes, 1)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = block(x, skips.pop())
        return self.head(x)
