"""Importing torchmetrics beside a torchvision that does not fit.

torchmetrics imports torchvision wherever that is installed, for image metrics that are not used here.
"""

from __future__ import annotations

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchmetrics

# isort: split

from torchmetrics.classification import MulticlassConfusionMatrix as MulticlassConfusionMatrix

__all__ = ["MulticlassConfusionMatrix"]
