"""One rule per ATen op, one module per kind of op. Importing the package fills the registry."""

from __future__ import annotations

from sparsekern.graph.propagate.rules import (
    arithmetic,
    attention,
    convolution,
    elementwise,
    hooked,
    joining,
    linear,
    normalisation,
    pooling,
    products,
    recurrent,
    reduce,
    shape,
)
from sparsekern.graph.propagate.rules.base import RULES, Call, Rule, register_rule

__all__ = [
    "RULES",
    "Call",
    "Rule",
    "arithmetic",
    "attention",
    "convolution",
    "elementwise",
    "hooked",
    "joining",
    "linear",
    "normalisation",
    "pooling",
    "products",
    "recurrent",
    "reduce",
    "register_rule",
    "shape",
]
