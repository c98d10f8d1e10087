"""The schedule of pruning: budgets over the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """One decision: after optimizer step ``step`` the cost is brought to ``share`` of the dense one.

    Channels chosen here have faded to zero ``fade_steps`` steps later, when the next event masks them.

    Attributes:
        step: number of optimizer steps before the event.
        share: cost after the event over the dense cost, in [0, 1].
        fade_steps: optimizer steps over which the gates fall to zero, at least 1.
    """

    step: int
    share: float
    fade_steps: int


@dataclass(frozen=True)
class Schedule:
    """Events between ``warmup`` and ``finish``, with budgets that fall fast at first and then level off.

    The share after event ``i`` of ``n`` is ``keep + (1 - keep) * (1 - i / n)**3``, the cubic of Zhu & Gupta
    2017, "To prune, or not to prune", eq. 1. Early events, while weights still move, remove most channels.

    Channels chosen at an event have faded to zero at the next one. With ``shrink`` they leave the live
    network then. Such a training costs ``warmup + (finish - warmup) * (keep + (1 - keep) * a) + (1 - finish)
    * keep`` of the dense one. The area ``a`` under the staircase is ``(1 + 1 / n)**2 / 4``: 0.303 for 10
    events, 0.276 for 20, 0.25 in the limit. Events are evenly spaced, so that every decision uses statistics
    of equally many steps. The spacing with the least area gives 0.291 for 10 events. That saves 0.3 % of a
    dense training for ``keep=0.2`` within 30 % of the steps; an earlier ``finish`` or more events save more.

    Attributes:
        events: in order of step.
        finish: the step after which all channels that fade out are masked.
    """

    events: tuple[Event, ...]
    finish: int

    @classmethod
    def cubic(cls, *, steps: int, keep: float, warmup: float, finish: float, events: int) -> Schedule:
        """The schedule of a training of ``steps`` optimizer steps.

        Args:
            steps: optimizer steps of the whole training.
            keep: share of the cost at the end, in (0, 1].
            warmup: share of the steps before the first event.
            finish: share of the steps by which the last channel is masked.
            events: number of decisions; the schedule has fewer if there are too few steps.

        Raises:
            ValueError: an argument is out of range, or there are too few steps for a single event.
        """
        _check(steps, warmup, finish, events)
        # There are no statistics before the first step, so no event can come earlier.
        first, last = max(1, round(warmup * steps)), round(finish * steps)
        if last - first < 1:
            raise ValueError(
                f"steps: got {steps}, expected enough steps for one event between warmup={warmup} and "
                f"finish={finish} of the training; raise steps or finish"
            )
        count = min(events, last - first)
        starts = [first + round(i * (last - first) / count) for i in range(count)]
        stops = [*starts[1:], last]
        return cls(
            tuple(
                Event(start, keep + (1 - keep) * (1 - (i + 1) / count) ** 3, stop - start)
                for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
            ),
            last,
        )

    @property
    def decay(self) -> float:
        """Decay per step of the running means of statistics.

        The means cover about one interval between events, so each decision uses fresh statistics.
        """
        return 1 - 1 / max(10, self.events[0].fade_steps)

    def to_plain(self) -> dict[str, Any]:
        """The schedule as plain values, for a state."""
        return {
            "events": [[event.step, event.share, event.fade_steps] for event in self.events],
            "finish": self.finish,
        }

    @classmethod
    def from_plain(cls, plain: Any) -> Schedule:
        """The schedule that :meth:`to_plain` has turned into ``plain``.

        Raises:
            ValueError: ``plain`` does not describe a schedule.
        """
        if not _is_plain(plain):
            raise ValueError(
                f"state['schedule']: got {str(plain)[:80]!r}, expected events [step, share, "
                f"fade_steps] in order of step, and the step of the finish"
            )
        return cls(tuple(Event(*entry) for entry in plain["events"]), plain["finish"])

    def at(self, step: int) -> Event | None:
        """The event right after optimizer step ``step``, or None."""
        return next((event for event in self.events if event.step == step), None)

    def after(self, step: int) -> Event | None:
        """The first event later than ``step``, or None."""
        return next((event for event in self.events if event.step > step), None)


@dataclass(frozen=True)
class Timing:
    """The arguments of a Pruner that determine its schedule, besides ``keep``; see :meth:`Schedule.cubic`."""

    steps: int
    warmup: float
    finish: float
    events: int

    def schedule(self, keep: float) -> Schedule:
        """The schedule that brings the cost to the share ``keep``.

        Raises:
            ValueError: see :meth:`Schedule.cubic`.
        """
        return Schedule.cubic(keep=keep, **asdict(self))


def _is_plain(plain: Any) -> bool:
    """Whether ``plain`` describes a schedule."""
    if not isinstance(plain, Mapping) or not isinstance(plain.get("events"), list) or not plain["events"]:
        return False
    for entry in plain["events"]:
        if not isinstance(entry, list) or [type(value) for value in entry] not in ([int, float, int],):
            return False
        step, share, fade_steps = entry
        if step < 1 or not 0 <= share <= 1 or fade_steps < 1:
            return False
    steps = [entry[0] for entry in plain["events"]]
    return steps == sorted(set(steps)) and type(plain.get("finish")) is int and plain["finish"] > steps[-1]


def _check(steps: object, warmup: object, finish: object, events: object) -> None:
    if not _is_whole(steps):
        raise ValueError(
            f"steps: got {steps!r}, expected a whole number >= 1, the optimizer steps of the training"
        )
    if not isinstance(warmup, (int, float)) or not 0 <= warmup < 1:
        raise ValueError(f"warmup: got {warmup!r}, expected a share of the steps in [0, 1)")
    if not isinstance(finish, (int, float)) or not warmup < finish <= 1:
        raise ValueError(f"finish: got {finish!r}, expected a share in (warmup={warmup!r}, 1]")
    if not _is_whole(events):
        raise ValueError(f"events: got {events!r}, expected a whole number >= 1")


def _is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
