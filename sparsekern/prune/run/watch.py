"""The hooks by which a Pruner watches an optimizer's steps.

It works on after nobody references the Pruner any more, until another Pruner replaces it.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable it imports nothing yet
from torch.optim import Optimizer

from sparsekern.prune.run.events import Events
from sparsekern.prune.run.gradient_check import GradientCheck
from sparsekern.prune.shrinkable import StateCheck
from sparsekern.prune.state.network import Network


class Watch:
    """The hook after an optimizer's steps. A later Pruner finds earlier ones by it.

    It references everything that pruning needs, but the Pruner only weakly. Pruning therefore goes on if the
    user keeps no reference to the Pruner.

    Attributes:
        pruner: weak reference to the Pruner; gives None once nobody else references it.
        hooks: handles of all registered hooks, including this one.
    """

    def __init__(self, pruner: object, network: Network, events: Events) -> None:
        self.pruner = weakref.ref(pruner)
        self.hooks: list[Any] = []
        self._network, self._events = network, events

    @property
    def parameters(self) -> set[int]:
        """``id`` of each of the model's parameters."""
        return set(map(id, self._network.parameters.values()))

    def attach(
        self, replaced: list[Watch], gradient_check: GradientCheck | None, state_check: StateCheck | None
    ) -> None:
        """Register all hooks with the optimizer and the modules; after an exception none is left.

        Args:
            replaced: watches to detach first, see :func:`abandoned`.
            gradient_check: the check before each step, None for no check.
            state_check: the check after the first step, None for no check.
        """
        for watch in replaced:
            watch.detach()
        optimizer = self._network.optimizer
        try:
            if gradient_check is not None:
                # The check runs before the statistics read the gradients; torch.compile does not trace it.
                check = torch.compiler.disable(gradient_check)
                self.hooks.append(optimizer.register_step_pre_hook(check))
            # A decision that an earlier step left undone runs before anything reads the gradients of this
            # step.
            catch_up = torch.compiler.disable(self._events.before_step)
            self.hooks.append(optimizer.register_step_pre_hook(catch_up))
            self._network.attach()
            if state_check is not None:
                self.hooks.append(optimizer.register_step_post_hook(torch.compiler.disable(state_check)))
            self.hooks.append(optimizer.register_step_post_hook(self))
        except BaseException:
            self.detach()
            raise

    # A compiled step must not trace the work of events.
    @_disable_dynamo
    def __call__(self, *_: Any) -> None:
        self._events.after_step()

    def detach(self) -> None:
        """Remove all hooks from the optimizer and the modules."""
        self._network.detach()
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def abandoned(optimizer: Optimizer, model: nn.Module) -> list[Watch]:
    """Watches of parameters of ``model`` whose Pruner nobody references; the next Pruner detaches them.

    Raises:
        RuntimeError: a Pruner of some of the parameters is still referenced.
    """
    own = {id(param) for param in model.parameters()}
    hooks = optimizer._optimizer_step_post_hooks.values()
    watches = [hook for hook in hooks if isinstance(hook, Watch) and hook.parameters & own]
    if any(watch.pruner() is not None for watch in watches):
        # A Pruner that only a reference cycle keeps alive counts as unreferenced.
        gc.collect()
    for watch in watches:
        if watch.pruner() is not None:
            raise RuntimeError(
                f"optimizer: got a {type(optimizer).__name__} whose steps already drive a Pruner of "
                f"{len(watch.parameters & own)} of these {len(own)} parameters, expected none; call "
                f"pruner.detach() on that one first"
            )
    return watches
