"""The check that stops a training at the first gradient that is not finite."""

from __future__ import annotations

from typing import Any

import torch

from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import local
from sparsekern.optim.hooks import with_gradients
from sparsekern.prune.state.network import Network

NONFINITE = ("ignore", "raise")


def check_nonfinite(nonfinite: object) -> bool:
    """Whether gradients are checked, for the argument ``nonfinite`` of a Pruner.

    Raises:
        ValueError: ``nonfinite`` is not one of ``NONFINITE``.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite: got {nonfinite!r}, expected one of {', '.join(map(repr, NONFINITE))}")
    return nonfinite == "raise"


class GradientCheck:
    """A hook before an optimizer's steps that checks all gradients, after each call of a closure if given.

    Raises:
        FloatingPointError: a gradient holds NaN or infinity, here or in another process.
    """

    def __init__(self, network: Network, ranks: Ranks) -> None:
        self._network = network
        self._ranks = ranks

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_gradients(args, kwargs, self._check)

    def _check(self) -> None:
        bad = [
            name
            for name, param in self._network.model.named_parameters()
            if param.grad is not None and not bool(torch.isfinite(local(param.grad)).all())
        ]
        # Only one process sees a given part of a sharded gradient, but all processes have to stop.
        if self._ranks.any(bool(bad)):
            raise FloatingPointError(
                f"gradient: got NaN or infinity in {', '.join(bad[:3]) or 'parameters of other ranks'} "
                f"({len(bad)} parameters here), expected finite values; nonfinite='ignore' lets the "
                f"optimizer go on"
            )
