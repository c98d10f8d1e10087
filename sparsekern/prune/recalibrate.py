"""Fresh batch norm statistics for a network whose channels were removed without training on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def run(model: nn.Module, inputs: Any) -> Any:
    """What the model gives for a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every batch norm by their plain mean over ``batches``.

    Only batch norms are switched to training mode, so dropout stays off; modes and momenta are restored.

    Args:
        model: changed in place.
        batches: inputs of the model: a tensor, a tuple of positional or a dict of keyword arguments, each.

    Returns:
        How many batches were used.

    Raises:
        ValueError: ``batches`` is empty; nothing has been changed then.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches: got none, expected at least one batch of inputs")
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    used = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            # A momentum of None makes torch keep the cumulative mean.
            norm.momentum = None
            norm.train()
        batch = first
        while batch is not None:
            run(model, batch)
            used += 1
            batch = next(iterator, None)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return used
