"""torchvision's networks, also where its operators do not load.

A torchvision that was built for another torch (the CPU build beside a CUDA one, say) fails to
import for want of two schemas; its networks need none of its operators.
"""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

from torchvision import models as models

__all__ = ["models", "torchvision"]
