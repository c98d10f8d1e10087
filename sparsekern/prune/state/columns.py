"""Masked columns in training: their gradients are zero, so that an optimizer's step leaves them at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.distributed.tensors import is_sharded, local
from sparsekern.prune.state.places import Kind, Place, entries_here


class MaskedColumns:
    """Hooks that set the gradients of masked columns to zero in the backward pass.

    A masked channel that is a constant gives the columns that read it a gradient. With a gradient, a weight
    and an optimizer state of zero, steps of SGD, Adam and the like leave the columns at zero, with momentum
    and weight decay, too. The hooks run before a gradient is clipped, averaged or used, so the norm of all
    gradients is that of the compact network. Each one is a single op without a host synchronisation. It reads
    which columns are masked from the device, so replays of a CUDA graph obey later masks.
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
                self._handles.append(_hook(parameter, flags))

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


def _hook(parameter: nn.Parameter, flags: Tensor) -> Any:
    """Register the hook for the columns ``flags`` of a parameter; returns its handle."""
    trained = parameter.requires_grad
    # A parameter that is frozen now may be trained later; torch takes no hooks for it while it is frozen.
    parameter.requires_grad_(True)
    try:
        if is_sharded(parameter):
            # The parts of a gradient exist only once they are accumulated.
            return parameter.register_post_accumulate_grad_hook(partial(_clear_accumulated, flags))
        if parameter._backward_hooks is not None:
            # A load that swaps tensors leaves the hooks with the old one; this registers them anew.
            parameter._backward_hooks = parameter._backward_hooks
        return parameter.register_hook(partial(_cleared, flags))
    finally:
        parameter.requires_grad_(trained)


def _cleared(flags: Tensor, grad: Tensor | None) -> Tensor | None:
    """Hook on a gradient: the gradient with zeros in the columns ``flags``."""
    return None if grad is None else grad.masked_fill(flags.to(grad.device), 0)


@torch.no_grad()
def _clear_accumulated(flags: Tensor, parameter: Tensor) -> None:
    """Hook on a sharded parameter: set this process's part of the columns' gradient to zero."""
    if parameter.grad is not None:
        mine = local(parameter.grad)
        mine.masked_fill_(flags.to(mine.device), 0)
