"""Importing torchmetrics beside a torchvision that does not fit torch.

torchmetrics imports an installed torchvision for image metrics that are not used here.
"""

from __future__ import annotations

from sparsekern.recipes._torchvision import blame  # must be imported before torchmetrics

# isort: split

try:
    from torchmetrics.classification import MulticlassConfusionMatrix as MulticlassConfusionMatrix
except Exception as error:
    reason = blame(error)
    if reason is None:
        raise
    raise ImportError(reason, name="torchvision") from error

__all__ = ["MulticlassConfusionMatrix"]
