"""The warning that the network does not meet its budget yet."""

from __future__ import annotations

import warnings

import numpy as np

from sparsekern.prune.decide.settings import Settings
from sparsekern.prune.run.events import Events
from sparsekern.prune.state.masking import FADING
from sparsekern.prune.state.network import Network


class BudgetWarning:
    """Warns once for every state of the training in which the network does not meet its budget.

    Args:
        settings: the budget and the steps of the whole training.
        network: the network and its masks.
        events: the progress of the training.
    """

    def __init__(self, settings: Settings, network: Network, events: Events) -> None:
        self._settings, self._network, self._events = settings, network, events
        self._warned: tuple[int, bytes] | None = None

    def warn(self) -> None:
        """Warn the caller of the Pruner's method if the budget is not met, with the share and the reason."""
        text = self._text()
        state = self._events.step, self._network.masks.state.tobytes()
        if text and state != self._warned:
            self._warned = state
            warnings.warn(text, UserWarning, stacklevel=4)

    def _text(self) -> str:
        keep, of, fading = self._settings.keep, self._settings.policy.of, self._network.masks.state == FADING
        share = self._network.share(of, self._network.masks.unmasked)
        if not fading.any() and share <= keep * (1 + 1e-9):
            return ""
        reason = self._reason(fading)
        return (
            f"pruner: got {share:.1%} of the dense {of}, expected at most {keep:.1%}: {reason}; go on until "
            f"pruner.finished"
        )

    def _reason(self, fading: np.ndarray) -> str:
        """The reason why the budget is not met; ``fading`` (bool ``[C]``) are the channels that fade out."""
        done, finish, steps = self._events.done(), self._events.schedule.finish, self._settings.timing.steps
        if not done:
            return (
                f"the {type(self._network.optimizer).__name__} given to the Pruner has not made a step: "
                f"another optimizer steps, or optimizer.step() was never called"
            )
        if done < finish:
            return f"{done} of {steps} steps are done, and the budget is met at step {finish}"
        if fading.any():
            left = int(np.max(self._network.masks.countdowns(), initial=0))
            return f"{int(fading.sum())} channels still fade out, for {left} more steps"
        return "decisions were undone by abort()"
