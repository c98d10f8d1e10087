"""The state that a Pruner saves, and how a training goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import nn

from sparsekern.compact.transaction import all_or_nothing
from sparsekern.prune.decide.settings import Settings
from sparsekern.prune.run.events import Events
from sparsekern.prune.schedule import Schedule
from sparsekern.prune.state.masking import FADING
from sparsekern.prune.state.network import Network
from sparsekern.prune.state.schema import STATE, STATE_VERSION

# Settings that states of earlier releases lack, with the values that those had.
_EARLIER = {"runtime": "torch", "depth": False, "equal": None}


class SavedState:
    """Collects the state of a Pruner's parts in one dict, and gives it back to them.

    Args:
        settings: the settings, which must be those of the saved Pruner, apart from ``steps``.
        network: the network and the state of its channels.
        events: the progress of the training.
    """

    def __init__(self, settings: Settings, network: Network, events: Events) -> None:
        self._settings, self._network, self._events = settings, network, events

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`sparsekern.Pruner.state_dict`."""
        return {
            "version": STATE_VERSION,
            "settings": self._settings.to_plain(),
            "schedule": self._events.schedule.to_plain(),
            "network": self._network.fingerprint(),
            **self._events.state_dict(),
            **self._network.state_dict(),
        }

    def check(self, state: Mapping[str, Any]) -> np.ndarray:
        """Check that ``state`` can be loaded; return the channels (bool ``[C]``) that the network then has.

        Raises:
            ValueError: see :meth:`sparsekern.Pruner.load_state_dict`.
        """
        version = state.get("version", STATE_VERSION) if isinstance(state, Mapping) else STATE_VERSION
        if version != STATE_VERSION:
            raise ValueError(
                f"state: got version {version!r}, expected {STATE_VERSION}; load it with the release of "
                f"sparsekern that saved it"
            )
        STATE.check(state, "state")
        fingerprint = self._network.fingerprint()
        if list(state["network"]) != fingerprint:
            raise ValueError(
                f"state: got the channels of another network ({len(state['network'])} groups), expected "
                f"those of this one ({len(fingerprint)} groups)"
            )
        for name, own in self._settings.to_plain().items():
            saved = state["settings"].get(name, _EARLIER.get(name))
            if name != "steps" and saved != own:
                raise ValueError(
                    f"state: got one saved with {name}={saved!r}, expected {name}={own!r}; make the Pruner "
                    f"with the saved value"
                )
        self._schedule_after(state)
        kept = self._network.check_state(state)
        _check_progress(state, Schedule.from_plain(state["schedule"]))
        return kept

    def load(self, state: Mapping[str, Any], also: Sequence[nn.Module]) -> None:
        """See :meth:`sparsekern.Pruner.load_state_dict`."""
        self.check(state)
        with all_or_nothing() as undo:
            self.load_within(undo, state, also)

    def load_within(
        self,
        undo: ExitStack,
        state: Mapping[str, Any],
        also: Sequence[nn.Module],
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Load as a part of a larger transaction.

        Args:
            undo: receives callbacks that restore everything.
            state: a state that :meth:`check` has accepted.
            also: further copies of the model that are cut with it.
            ready: called before the first change.
        """
        schedule = self._schedule_after(state)
        self._network.load_state_dict(state, also, undo, ready)
        self._events.load_state_dict(state, schedule, undo)

    def _schedule_after(self, state: Mapping[str, Any]) -> Schedule:
        """The schedule of the training after ``state``: the saved one, or this Pruner's if it extends it.

        Raises:
            ValueError: the budget is not met, and no event is left with this Pruner's ``steps``.
        """
        saved, step = Schedule.from_plain(state["schedule"]), int(state["step"])
        steps, own = self._settings.timing.steps, self._events.schedule
        if saved.after(step) is None or state["settings"]["steps"] == steps:
            return saved
        if own.after(step) is None:
            raise ValueError(
                f"steps: got {steps}, so that the last event comes after step {own.events[-1].step}, for a "
                f"state after step {step} that has not met its budget; expected more steps"
            )
        return own


def _check_progress(state: Mapping[str, Any], schedule: Schedule) -> None:
    """Check that the progress of a state fits the schedule.

    Args:
        state: the state; it has to satisfy :data:`STATE`.
        schedule: the schedule that the state was saved with.

    Raises:
        ValueError: ``next`` does not fit the step, or a countdown is longer than all of the schedule.
    """
    step, following = state["step"], state["next"]
    event = schedule.after(step)
    longest = max(event.fade_steps for event in schedule.events)
    fading = bool((state["channels"] == FADING).any())
    # Skipped steps delay the end of fading; in an extended training it may fall between events.
    ends = tuple(range(step + 1, step + longest + 1))
    if event is not None or step < schedule.finish:
        expected: tuple[int | None, ...] = (schedule.finish if event is None else event.step,)
        expected += ends if fading else ()
    else:
        # An abort leaves nothing to wait for.
        expected = ends if fading else (None, *ends)
    # A failed decision is still due at the latest step.
    due = following == step and (schedule.at(step) is not None or step >= schedule.finish)
    if following not in expected and not due:
        text = " or ".join(map(str, sorted({expected[0], expected[-1]}, key=str)))
        raise ValueError(f"state['next']: got {following} at step {step}, expected {text} by the schedule")
    left = int(state["rows"]["countdown"].max()) if len(state["rows"]["countdown"]) else 0
    if left > longest:
        raise ValueError(f"state['rows']['countdown']: got {left}, expected at most {longest} steps")
