"""Finding batch norms with their activations in a traced model, and replacing each pair by one module."""

from sparsekern.fusion.replace import Fusion as Fusion
from sparsekern.fusion.replace import fuse as fuse
from sparsekern.fusion.replace import unfuse as unfuse

__all__ = [
    "Fusion",
    "fuse",
    "unfuse",
]


def __dir__() -> list[str]:
    return __all__
