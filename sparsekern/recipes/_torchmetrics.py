"""Importing torchmetrics beside a torchvision that does not fit.

torchmetrics imports torchvision wherever that is installed, for image metrics that are not used
here. A torchvision that was built for another torch (the CPU build beside a CUDA one, say) cannot
register its operators and fails in that import for want of two schemas; with these it succeeds.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # a schema lives as long as its library object

if find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for _schema in _SCHEMAS:
            _library.define(_schema)

from torchmetrics.classification import (  # noqa: E402
    MulticlassConfusionMatrix as MulticlassConfusionMatrix,
)

__all__ = ["MulticlassConfusionMatrix"]
