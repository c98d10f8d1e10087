"""Segmentation networks in readable code; all return logits of the input's height and width."""

from __future__ import annotations

from sparsekern.recipes.models.lraspp import LRASPP as LRASPP
from sparsekern.recipes.models.lraspp import lraspp_mobilenetv3 as lraspp_mobilenetv3
from sparsekern.recipes.models.mobilenetv3 import MobileNetV3Features as MobileNetV3Features
from sparsekern.recipes.models.unet import UNet as UNet

__all__ = ["LRASPP", "MobileNetV3Features", "UNet", "lraspp_mobilenetv3"]
