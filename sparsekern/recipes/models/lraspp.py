"""Lite reduced atrous spatial pyramid pooling on MobileNetV3 (Howard et al. 2019, section 6.4)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.recipes.models.mobilenetv3 import MobileNetV3Features, Variant


class LRASPPHead(nn.Module):
    """Class logits at the resolution of the low-level features.

    Shapes: low `[N, low_channels, H, W]`, high `[N, high_channels, h, w]` to `[N, classes, H, W]`.
    """

    def __init__(self, low_channels: int, high_channels: int, classes: int, inter_channels: int) -> None:
        super().__init__()
        self.cbr = nn.Sequential(
            nn.Conv2d(high_channels, inter_channels, 1, bias=False),
            nn.BatchNorm2d(inter_channels),
            nn.ReLU(inplace=True),
        )
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(high_channels, inter_channels, 1, bias=False),
            nn.Sigmoid(),
        )
        self.low_classifier = nn.Conv2d(low_channels, classes, 1)
        self.high_classifier = nn.Conv2d(inter_channels, classes, 1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        x = self.cbr(high) * self.scale(high)
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.low_classifier(low) + self.high_classifier(x)


class LRASPP(nn.Module):
    """Segmentation network of a MobileNetV3 backbone and an LR-ASPP head.

    State-dict keys equal those of `torchvision.models.segmentation.lraspp_mobilenet_v3_large`.

    Args:
        backbone: the feature extractor, used at its strides 8 and 16 (or 32 if not dilated).
        classes: channels of the output; 1 for foreground against background.
        inter_channels: width of the head.

    Shapes: float `[N, 3, H, W]` to logits `[N, classes, H, W]`.

    Raises:
        ValueError: `classes` or `inter_channels` below 1.
    """

    def __init__(self, backbone: MobileNetV3Features, classes: int = 1, inter_channels: int = 128) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("inter_channels", inter_channels)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected a whole number >= 1")
        self.backbone = backbone
        self.classifier = LRASPPHead(backbone.low_channels, backbone.high_channels, classes, inter_channels)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.backbone.low_and_high(x)
        logits = self.classifier(low, high)
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def lraspp_mobilenetv3(
    variant: Variant = "large",
    *,
    classes: int = 1,
    multiplier: float = 1.0,
    dilated: bool = True,
    backbone_weights: Mapping[str, Tensor] | None = None,
) -> LRASPP:
    """MobileNetV3 with an LR-ASPP head.

    Args:
        variant: `"large"` or `"small"`.
        classes: channels of the output.
        multiplier: scales the channels of the backbone.
        dilated: keep a stride of 16 pixels in the last stage.
        backbone_weights: state dict of torchvision's `mobilenet_v3_large()` or `_small()`, or of its
            `features` alone; only the part below `features.` is loaded.

    Raises:
        RuntimeError: `backbone_weights` belongs to another network (from `load_state_dict`).
    """
    model = LRASPP(MobileNetV3Features(variant, multiplier=multiplier, dilated=dilated), classes)
    if backbone_weights is not None:
        prefix = "features."
        features = {k[len(prefix) :]: v for k, v in backbone_weights.items() if k.startswith(prefix)}
        model.backbone.load_state_dict(features or dict(backbone_weights))
    return model
