"""Modules of our own that stand in for torch's."""

from sparsekern.nn.attention import MultiheadAttention as MultiheadAttention
from sparsekern.nn.norm_act import NormAct2d as NormAct2d
