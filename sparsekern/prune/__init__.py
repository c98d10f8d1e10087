"""Pruning: choosing channels from statistics of a training, and masking them."""

from sparsekern.prune.decide import allocate as allocate
from sparsekern.prune.decide import criteria as criteria
from sparsekern.prune.once import prune_once as prune_once
from sparsekern.prune.pruner import Pruner as Pruner
from sparsekern.prune.recalibrate import recalibrate as recalibrate

__all__ = [
    "Pruner",
    "allocate",
    "criteria",
    "prune_once",
    "recalibrate",
]


def __dir__() -> list[str]:
    return __all__
