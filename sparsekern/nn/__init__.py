"""Replacements for modules of torch."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from sparsekern.nn.attention import MultiheadAttention as MultiheadAttention
from sparsekern.nn.norm_act import FusedActivation as FusedActivation
from sparsekern.nn.norm_act import NormAct2d as NormAct2d

__all__ = [
    "FusedActivation",
    "MultiheadAttention",
    "NormAct2d",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in ("Fusion", "fuse", "unfuse"):
        warnings.warn(
            f"sparsekern.nn.{name} is now sparsekern.fusion.{name}; the next release drops the old name",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module("sparsekern.fusion"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
