"""The sizes and names that the tensors of a network will have after a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

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
