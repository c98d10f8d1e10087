"""torchvision's networks, also where its operators do not load."""

from __future__ import annotations

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchvision

# isort: split

import torchvision
from torchvision import models as models

__all__ = ["models", "torchvision"]
