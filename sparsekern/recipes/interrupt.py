"""Signals that ask a run to stop, answered when its state is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Ctrl-C, and what schedulers and `kill` send.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Request:
    """Whether a signal came; `number` is that signal."""

    number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None


@contextmanager
def deferred() -> Iterator[Request]:
    """Notes the first of `SIGNALS` in the block instead of acting on it; a second one acts at once.

    A signal that the process ignores stays ignored. Outside of the main thread, where Python allows no
    handlers, signals act as before.
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
