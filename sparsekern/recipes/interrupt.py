"""Deferring the signals that stop a run until its state is consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# SIGINT comes from Ctrl-C, SIGTERM from schedulers and `kill`.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Request:
    """A request to stop: `number` is the signal that came, or None."""

    number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None


@contextmanager
def deferred() -> Iterator[Request]:
    """Record the first of `SIGNALS` in the block instead of acting on it; a second one acts at once.

    A signal that the process ignores stays ignored. Outside the main thread signals act as before, because
    Python allows no handlers there.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.getsignal(number) for number in SIGNALS}
    former = {number: old for number, old in former.items() if old not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, old in former.items():
            signal.signal(number, old)

    def note(number: int, _: FrameType | None) -> None:
        restore()
        request.number = number

    for number in former:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
