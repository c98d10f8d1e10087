"""Changes that are made as a whole or not at all, whatever interrupts them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType


@contextmanager
def uninterrupted(*, insisting: bool = False) -> Iterator[None]:
    """Ctrl-C takes effect when the block has ended.

    Only the main thread handles signals, so other threads see no difference.

    Args:
        insisting: a second Ctrl-C raises KeyboardInterrupt at once, for blocks that may run a user's code.
    """
    before = signal.getsignal(signal.SIGINT)
    # A handler that was not set from Python could not be set again.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and insisting:
            came.clear()
            raise KeyboardInterrupt
        came.append(number)

    try:
        signal.signal(signal.SIGINT, note)
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """A stack for what undoes the block's changes: called, the last one first, where the block fails.

    Whoever changes something registers beforehand what restores it. Ctrl-C waits until the block has ended.
    """
    with uninterrupted(), ExitStack() as undo:
        yield undo
        undo.pop_all()
