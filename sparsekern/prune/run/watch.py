"""A Pruner's hold on an optimizer: it outlives a Pruner that nobody keeps, and gives way to another one."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsekern.prune.run.events import Events
from sparsekern.prune.state.network import Network


class Watch:
    """The hook after an optimizer's steps, by which a later Pruner finds the ones that are there.

    It holds everything that pruning needs, but the Pruner only weakly: a training goes on being pruned where
    nobody has kept the Pruner.

    Attributes:
        pruner: gives the Pruner, None once nobody holds it.
        parameters: ``id`` of each of the model's.
        hooks: handles of all that was registered, this one's included.
    """

    def __init__(self, pruner: object, network: Network, events: Events) -> None:
        self.pruner = weakref.ref(pruner)
        self.parameters = {id(param) for param in network.model.parameters()}
        self.hooks: list[Any] = []
        self._network, self._events = network, events

    # A compiled step must not trace what happens at events.
    @torch.compiler.disable
    def __call__(self, *_: Any) -> None:
        self._events.after_step()

    def detach(self) -> None:
        """Leave optimizer and modules alone."""
        self._network.detach()
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def abandoned(optimizer: Optimizer, model: nn.Module) -> list[Watch]:
    """Watches over parameters of ``model`` whose Pruner nobody holds: to be detached by the next one.

    Raises:
        RuntimeError: somebody holds the Pruner of some of the parameters.
    """
    own = {id(param) for param in model.parameters()}
    hooks = optimizer._optimizer_step_post_hooks.values()
    watches = [hook for hook in hooks if isinstance(hook, Watch) and hook.parameters & own]
    if any(watch.pruner() is not None for watch in watches):
        # What is left of a cycle is held by nobody.
        gc.collect()
    for watch in watches:
        if watch.pruner() is not None:
            raise RuntimeError(
                f"optimizer: got a {type(optimizer).__name__} whose steps already drive a Pruner of "
                f"{len(watch.parameters & own)} of these {len(own)} parameters, expected none; call "
                f"pruner.detach() on that one first"
            )
    return watches
