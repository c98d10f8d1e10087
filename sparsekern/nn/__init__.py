"""What a model can be made of, and the fusion of what it is made of."""

from sparsekern.modules import MultiheadAttention as MultiheadAttention
from sparsekern.modules import NormAct2d as NormAct2d
from sparsekern.nn.fuse import Fusion as Fusion
from sparsekern.nn.fuse import fuse as fuse
from sparsekern.nn.fuse import unfuse as unfuse

__all__ = [
    "Fusion",
    "MultiheadAttention",
    "NormAct2d",
    "fuse",
    "unfuse",
]


def __dir__() -> list[str]:
    return __all__
