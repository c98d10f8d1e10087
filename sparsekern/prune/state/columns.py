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
    gradients is that of the compact network. Each one is a single op without a host synchronisation.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        """Make no hooks yet.

        Args:
            places: all places of the channels.
        """
        self._places = [place for place in places if place.kind is Kind.MASKED_COLUMN]
        self._handles: list[Any] = []

    def hold(self, parameters: Mapping[str, nn.Parameter], masked: np.ndarray) -> None:
        """Replace the hooks by those of the channels ``masked``.

        Args:
            parameters: the model's parameters by name.
            masked: bool ``[C]``.
        """
        self.release()
        for place in self._places:
            entries = place.indices(masked)
            if len(entries):
                self._handles.append(_hook(parameters[place.name], place.dim, entries))

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(parameter: nn.Parameter, dim: int, entries: np.ndarray) -> Any:
    """Register the hook for some columns of a parameter; returns its handle."""
    _, index, _ = entries_here(parameter, dim, entries)
    trained = parameter.requires_grad
    # A parameter that is frozen now may be trained later; torch takes no hooks for it while it is frozen.
    parameter.requires_grad_(True)
    try:
        if is_sharded(parameter):
            # The parts of a gradient exist only once they are accumulated.
            return parameter.register_post_accumulate_grad_hook(partial(_clear_accumulated, dim, index))
        if parameter._backward_hooks is not None:
            # A load that swaps tensors leaves the hooks with the old one; this registers them anew.
            parameter._backward_hooks = parameter._backward_hooks
        return parameter.register_hook(partial(_cleared, dim, index))
    finally:
        parameter.requires_grad_(trained)


def _cleared(dim: int, index: Tensor, grad: Tensor | None) -> Tensor | None:
    """Hook on a gradient: the gradient with zeros at ``index`` along ``dim``."""
    return None if grad is None else grad.index_fill(dim, index.to(grad.device), 0)


@torch.no_grad()
def _clear_accumulated(dim: int, index: Tensor, parameter: Tensor) -> None:
    """Hook on a sharded parameter: set this process's part of its gradient to zero at ``index``."""
    if parameter.grad is not None:
        mine = local(parameter.grad)
        mine.index_fill_(dim, index.to(mine.device), 0)
