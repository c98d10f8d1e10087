"""Modules of our own that stand in for torch's."""

from sparsekern.nn.attention import MultiheadAttention as MultiheadAttention
