"""What happens at an event: channels are chosen, fade out, are masked and cut, as a whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import nn

from sparsekern.compact.transaction import all_or_nothing, uninterrupted
from sparsekern.distributed.ranks import Ranks
from sparsekern.kernels.native import cuda_library
from sparsekern.prune.decide.policy import Choice, Policy
from sparsekern.prune.run.step_count import Rates, SkippedSteps, differing_rates, idle
from sparsekern.prune.schedule import Schedule
from sparsekern.prune.state.masking import FADING
from sparsekern.prune.state.network import Network


class Events:
    """Counts the steps of a training, and makes decisions after the steps that its schedule names.

    Attributes:
        schedule: steps and budgets of the decisions.
        step: number of steps so far, including those that GradScaler has skipped since the latest decision.
        next: the step after which the next work is due, or None.
    """

    def __init__(
        self, network: Network, policy: Policy, schedule: Schedule, ranks: Ranks, *, shrinks: bool
    ) -> None:
        """Start before the first step; with ``shrinks`` events cut masked channels out of the live model."""
        self._network, self._policy, self._ranks, self._shrinks = network, policy, ranks, shrinks
        self.schedule = schedule
        self.step = 0
        self._skipped, self._rates = SkippedSteps(), Rates()
        self._nonfinite_seen = 0
        self._is_replayed = False
        self.next = self._next_step()

    @property
    def finished(self) -> bool:
        """Whether the budget is met and no channel is fading out any more."""
        # At ``finish`` there is a decision, which has subtracted the skipped steps from the count.
        return self.step >= self.schedule.finish and not (self._network.masks.state == FADING).any()

    def done(self) -> int:
        """Number of steps so far, without those that GradScaler has skipped."""
        return self.step - self._skipped.pending()

    def state_dict(self) -> dict[str, Any]:
        """The progress as plain values."""
        return {"step": self.done(), "next": self.next, "nonfinite_seen": self._nonfinite_seen}

    def load_state_dict(self, state: Mapping[str, Any], schedule: Schedule, undo: ExitStack) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: the saved state, with the ``schedule`` of that training.
            schedule: the schedule to go on with; it differs if the training is extended.
            undo: receives a callback that restores the present state.
        """
        undo.callback(vars(self).update, dict(vars(self)))
        self.schedule = schedule
        self.step = int(state["step"])
        self._nonfinite_seen = int(state["nonfinite_seen"])
        self._skipped, self._rates = SkippedSteps(), Rates()
        same = schedule.to_plain() == state["schedule"]
        self.next = state["next"] if same else self._next_of_new_schedule()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """A block in which a CUDA graph is captured that makes optimizer steps.

        A capture records a step and does not make it, so steps in the block do not count. Masks and penalties
        are read from the device, so a later replay obeys those of that time.

        Raises:
            RuntimeError: every event shrinks the model.
        """
        if self._shrinks:
            raise RuntimeError(
                "pruner: got the capture of a CUDA graph with shrink=True, expected shrink=False: a graph "
                "keeps the sizes that it was captured with"
            )
        self.before_step()
        self._network.masks.hold_columns(everywhere=True)
        self._is_replayed = True
        try:
            yield
        finally:
            self._is_replayed = False

    def advance(self, steps: int) -> None:
        """Count the steps that replays of a CUDA graph have made, and decide if an event is due.

        Args:
            steps: number of optimizer steps since the last call. A decision that was due earlier is made now.

        Raises:
            ValueError: ``steps`` is not a whole number >= 1.
            RuntimeError: a CUDA graph is being captured.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps: got {steps!r}, expected a whole number >= 1")
        if cuda_library.capturing():
            raise RuntimeError(
                "pruner: got advance() in the capture of a CUDA graph, expected it after a replay"
            )
        for _ in range(steps):
            self.before_step()
            self._count()

    def _is_captured(self) -> bool:
        """Whether the present step is only recorded.

        Raises:
            RuntimeError: it is recorded, and nobody has said that its replays will be counted.
        """
        if not cuda_library.capturing():
            return False
        if not self._is_replayed:
            raise RuntimeError(
                "optimizer: got a step in the capture of a CUDA graph, whose replays a Pruner does not see, "
                "expected `with pruner.capturing():` around the capture, and `pruner.advance()` after each "
                "replay"
            )
        return True

    def before_step(self, *_: Any) -> None:
        """Hook before an optimizer's step: repeats a decision that has failed or was interrupted."""
        if self._is_captured():
            return
        if self.next is not None and self.step >= self.next:
            self._decide(self.next)

    def after_step(self, *_: Any) -> None:
        """Hook after an optimizer's step: counts it, and decides if an event is due."""
        optimizer = self._network.optimizer
        if self._is_captured():
            return
        if idle(optimizer, self._network.rows.table, self._ranks):
            return
        self._count()

    def _count(self) -> None:
        """Count a step that has trained, and decide if an event is due."""
        optimizer = self._network.optimizer
        self._skipped.note(optimizer)
        self.step += 1
        if self._ranks.size > 1:
            self._rates.note(self.step, optimizer)
        if self.next is not None and self.step >= self.next:
            self._decide(self.next)

    def shrink(self, also: Sequence[nn.Module]) -> bool:
        """See :meth:`sparsekern.Pruner.shrink`."""
        with all_or_nothing() as undo, self._ranks.changing("shrinking the model") as (ready, done):
            self._network.check_masked()
            cut = self._network.shrink(undo, also, ready)
            done()
        return cut

    def abort(self) -> int:
        """See :meth:`sparsekern.Pruner.abort`."""
        with uninterrupted():
            self._network.rows.table.settle()
            return int(self._network.masks.restore().sum())

    def _decide(self, due: int) -> None:
        """Do all the work due after step ``due``, or change nothing and leave it to the next step."""
        ranks, network = self._ranks, self._network
        with uninterrupted(insisting=True):
            self.step -= self._skipped.take(ranks)
            if self.step < due:
                return
            network.rows.table.settle()
            network.activations.average(ranks)
            event = self.schedule.at(due)
            rates = self._rates.parts()
            with ranks.agreeing(f"pruning after step {due}", rates, differing_rates) as check:
                network.check_masked()
                faded_out = network.masks.faded_out()
                choice = None
                if event is not None:
                    choice = self._policy.choose(network, event, self.schedule)
                check(due, rates, faded_out, *(choice.parts() if choice is not None else ()))
            with all_or_nothing() as undo, ranks.changing(f"masking after step {due}") as (ready, done):
                self._carry_out(faded_out, choice, undo, ready)
                done()
        self._rates.forget()
        self._warn_of_nonfinite()

    def _carry_out(
        self, faded_out: np.ndarray, choice: Choice | None, undo: ExitStack, ready: Callable[[], object]
    ) -> None:
        network = self._network
        undo.callback(setattr, self, "next", self.next)
        network.masks.restored_by(undo)
        network.masks.take_over(faded_out, undo)
        network.masks.mask(faded_out, undo)
        if choice is not None:
            choice.carry_out(network.masks, undo)
        if self._shrinks:
            # One cut, after the last read of the statistics: every cut costs a recompilation.
            network.shrink(undo, ready=ready)
        else:
            ready()
        self.next = self._next_step()

    def _next_of_new_schedule(self) -> int | None:
        """The next step with work to do, after the schedule has changed."""
        masks = self._network.masks
        # The penalties were for the old distance between events; the next event sets new ones.
        masks.penalise(np.zeros(len(masks.state), bool), 0.0)
        left = int(masks.countdowns().max(initial=0))
        following = self._next_step()
        return following if not left or following is None else min(following, self.step + left)

    def _next_step(self) -> int | None:
        event = self.schedule.after(self.step)
        if event is not None:
            return event.step
        if self.step < self.schedule.finish:
            return self.schedule.finish
        # Channels of parameters without a gradient are still fading: check again after the steps they need.
        left = int(self._network.masks.countdowns().max(initial=0))
        return self.step + left if left else None

    def _warn_of_nonfinite(self) -> None:
        count = int(self._network.rows.table.nonfinite)
        if count > self._nonfinite_seen:
            new, self._nonfinite_seen = count - self._nonfinite_seen, count
            warnings.warn(
                f"gradient: got NaN or infinity in {new} rows, expected finite values; the pruning "
                f"statistics leave these rows out, and nonfinite='raise' stops at the first one",
                stacklevel=2,
            )
