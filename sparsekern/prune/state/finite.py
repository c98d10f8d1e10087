"""Stopping at the first gradient that is not finite."""

from __future__ import annotations

from typing import Any

import torch

from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import local
from sparsekern.optim.hooks import with_gradients
from sparsekern.prune.state.network import Network


class GradientCheck:
    """A hook before an optimizer's steps: after the closure, each time that the step calls it, if it has one.

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
        # A part of a gradient is seen by one process only, and all have to stop.
        if self._ranks.any(bool(bad)):
            raise FloatingPointError(
                f"gradient: got NaN or infinity in {', '.join(bad[:3]) or 'what other ranks hold'} "
                f"({len(bad)} parameters here), expected finite values; nonfinite='ignore' lets the "
                f"optimizer go on"
            )
