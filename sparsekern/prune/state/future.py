"""The sizes and names that the tensors of a network will have after a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsekern.compact import make_plan
from sparsekern.compact.shrink import check_copies
from sparsekern.compact.surgery import match, registered
from sparsekern.graph import ChannelGraph
from sparsekern.graph.numbers import KeptBlocks, after_removal


@dataclass(frozen=True)
class Future:
    """A network after a cut that has not been made yet.

    Attributes:
        shapes: shapes by ``id`` of the tensors; others keep theirs.
        gone: ``id`` of the parameters and buffers that go with removed blocks.
        blocks: the modules that stay of each list that loses some, by its path.
    """

    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    gone: frozenset[int] = frozenset()
    blocks: KeptBlocks = field(default_factory=dict)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of a tensor after the cut."""
        return self.shapes.get(id(tensor), tuple(tensor.shape))

    def entries(self, model: nn.Module) -> dict[str, Any]:
        """The present entries of ``state_dict()`` of a module that stay, by the names that they will have."""
        moved = (
            (after_removal(name, self.blocks), own) for name, own in model.state_dict(keep_vars=True).items()
        )
        return {name: own for name, own in moved if name is not None}


def future_of(model: nn.Module, graph: ChannelGraph, kept: np.ndarray, also: Sequence[nn.Module]) -> Future:
    """The tensors of a model and its copies after a cut.

    Args:
        model: the model.
        graph: its channels.
        kept: the channels that stay, bool ``[C]``.
        also: copies of the model.

    Raises:
        TypeError, ValueError: an entry of ``also`` is not a copy of the model.
    """
    plan, tensors = make_plan(graph, kept), registered(model)
    parts = match(plan, tensors)
    for copied in check_copies(model, plan, also):
        parts |= copied
    gone = frozenset(id(entry.tensor) for entry in tensors if entry.goes(plan))
    return Future(
        {identity: part.new_shape for identity, part in parts.items()}, gone, graph.kept_blocks(kept)
    )
