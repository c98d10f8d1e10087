"""The channels of a network that can be removed, the rows and columns they consist of, and their cost."""

from __future__ import annotations

from sparsekern.graph.blocks import Block
from sparsekern.graph.channels import ChannelGraph
from sparsekern.graph.cost import Cost
from sparsekern.graph.groups import Gates, Group, Note, TensorSlots
from sparsekern.graph.propagate.rules import register_rule
from sparsekern.graph.prove.dry_run import dry_run
from sparsekern.graph.trace import trace

__all__ = [
    "Block",
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
