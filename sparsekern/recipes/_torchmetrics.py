"""Importing torchmetrics beside a torchvision that does not fit torch.

torchmetrics imports an installed torchvision for image metrics that are not used here.
"""

from __future__ import annotations

from sparsekern.recipes._torchvision import blaming  # must be imported before torchmetrics

# isort: split

with blaming():
    from torchmetrics.classification import MulticlassConfusionMatrix as MulticlassConfusionMatrix

__all__ = ["MulticlassConfusionMatrix"]
