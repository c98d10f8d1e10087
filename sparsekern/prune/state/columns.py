"""Masked columns in training: their gradients are zero, so that an optimizer's step leaves them at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.distributed.tensors import local
from sparsekern.optim.gradients import change_gradient
from sparsekern.prune.state.places import Kind, Place, entries_here


class MaskedColumns:
    """Hooks that set the gradients of masked columns to zero in the backward pass.

    A masked channel that is a constant gives the columns that read it a gradient. With a gradient, a weight
    and an optimizer state of zero, steps of SGD, Adam and the like leave the columns at zero, with momentum
    and weight decay, too. The hooks run before a gradient is clipped, averaged or used, so the norm of all
    gradients is that of the compact network. They need no host synchronisation: the device holds which
    columns are masked, so replays of a CUDA graph obey later masks.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        """Make no hooks yet.

        Args:
            places: all places of the channels.
        """
        self._places = [place for place in places if place.kind is Kind.MASKED_COLUMN]
        self._flags: dict[int, Tensor] = {}
        self._everywhere = False
        self._handles: list[Any] = []

    def hold(
        self, parameters: Mapping[str, nn.Parameter], masked: np.ndarray, *, everywhere: bool = False
    ) -> None:
        """Replace the hooks by those of the channels ``masked``.

        Args:
            parameters: the model's parameters by name.
            masked: bool ``[C]``.
            everywhere: also make the hooks of parameters without a masked column, now and later.
        """
        self.release()
        self._everywhere |= everywhere
        for number, place in enumerate(self._places):
            entries = place.indices(masked)
            if len(entries) or self._everywhere:
                parameter = parameters[place.name]
                mine, index, _ = entries_here(parameter, place.dim, entries)
                flags = self._flags_of(number, mine, place.dim)
                flags.zero_().index_fill_(place.dim, index, True)
                self._handles.append(change_gradient(parameter, partial(_clear, flags)))

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _flags_of(self, number: int, mine: Tensor, dim: int) -> Tensor:
        """The flags of a place, bool, which broadcast to its tensor and stay at one address."""
        shape = [size if d == dim else 1 for d, size in enumerate(mine.shape)]
        held = self._flags.get(number)
        if held is None or list(held.shape) != shape or held.device != mine.device:
            held = self._flags[number] = torch.zeros(shape, dtype=torch.bool, device=mine.device)
        return held


@torch.no_grad()
def _clear(flags: Tensor, grad: Tensor) -> None:
    """Set the columns ``flags`` of this process's part of a gradient to zero."""
    mine = local(grad)
    mine.masked_fill_(flags.to(mine.device), 0)
