"""Modules of our own that stand in for torch's; the graph and compaction know them."""

from sparsekern.modules.attention import MultiheadAttention as MultiheadAttention
from sparsekern.modules.norm_act import FusedActivation as FusedActivation
from sparsekern.modules.norm_act import NormAct2d as NormAct2d

__all__ = [
    "FusedActivation",
    "MultiheadAttention",
    "NormAct2d",
]


def __dir__() -> list[str]:
    return __all__
