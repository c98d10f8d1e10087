"""Which channels of a network can be removed, what they are made of and what they cost."""

from __future__ import annotations

from .channels import ChannelGraph, Gates, Group, Note, TensorSlots
from .cost import Cost
from .dry_run import dry_run
from .rules import register_rule
from .trace import trace

__all__ = [
    "ChannelGraph",
    "Cost",
    "Gates",
    "Group",
    "Note",
    "TensorSlots",
    "dry_run",
    "register_rule",
    "trace",
]


def __dir__() -> list[str]:
    return __all__
