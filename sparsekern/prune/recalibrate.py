"""New batch norm statistics for a network that is not trained further after its pruning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from sparsekern.prune.calibration import ForwardLoss, check_losses, run_batch


def recalibrate(model: nn.Module, batches: Iterable[Any], *, forward_loss: ForwardLoss | None = None) -> int:
    """Replace the running statistics of every batch norm by their plain mean over ``batches``.

    Only batch norms switch to training mode, so dropout stays off. Modes and momenta are restored.

    Args:
        model: the model; it is changed in place.
        batches: inputs of the model, each a tensor, a tuple of positional or a dict of keyword arguments; or
            batches of the form that ``forward_loss`` takes. They have to be on the model's device.
        forward_loss: ``forward_loss(model, batch)`` runs the model on a batch. Its result is not used.

    Returns:
        The number of batches used.

    Raises:
        TypeError: ``forward_loss`` is not a function.
        ValueError: ``batches`` is empty, or the model does not accept one. Nothing has changed after any
            exception.
    """
    check_losses(None, forward_loss)
    if forward_loss is None:
        passes = ((lambda b=batch: run_batch(model, b, "batches")) for batch in batches)
    else:
        passes = ((lambda b=batch: forward_loss(model, b)) for batch in batches)
    used = remeasure(model, passes)
    if not used:
        raise ValueError("batches: got none, expected at least one batch of inputs")
    return used


@torch.no_grad()
def remeasure(model: nn.Module, passes: Iterable[Callable[[], Any]]) -> int:
    """As :func:`recalibrate`, for functions that each run the model on a batch; 0 if there is none."""
    iterator = iter(passes)
    first = next(iterator, None)
    if first is None:
        return 0
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    used = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            # A momentum of None makes torch keep the cumulative mean.
            norm.momentum = None
            norm.train()
        for go_through in itertools.chain((first,), iterator):
            go_through()
            used += 1
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return used
