"""Transactions: a change is made completely or not at all, also when it is interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType


@contextmanager
def uninterrupted(*, insisting: bool = False) -> Iterator[None]:
    """Delay Ctrl-C until the end of the block.

    Only the main thread handles signals, so other threads see no difference.

    Args:
        insisting: whether a second Ctrl-C raises KeyboardInterrupt at once; for blocks that may run a user's
            code.
    """
    before = signal.getsignal(signal.SIGINT)
    # Python cannot restore a handler that was not set from Python.
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
    """Undo the changes of the block if it raises.

    Code in the block registers a callback on the stack before each change. The callbacks run in reverse order
    if the block raises. Ctrl-C takes effect after the block.

    Yields:
        The stack of callbacks.
    """
    with uninterrupted(), ExitStack() as undo:
        yield undo
        undo.pop_all()
