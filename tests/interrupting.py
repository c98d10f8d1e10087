"""Stops a piece of code at any line that it runs: by Ctrl-C, or by an exception."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch


class Injected(Exception):
    """The exception that is raised at a line."""


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def failure() -> None:
    raise Injected


class At:
    """Acts at one line: the ``line``-th that ``files`` run, counted since the function ``begin`` was entered.

    Attributes:
        seen: how many lines there were.
    """

    def __init__(self, line: int, act: Callable[[], None], files: tuple[str, ...], begin: str) -> None:
        self._line, self._act, self._files, self._begin = line, act, files, begin
        self._counting = False
        self.seen = 0

    def __enter__(self) -> At:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(self._before)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self._files):
            return None
        self._counting |= frame.f_code.co_name == self._begin
        return self._trace

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and self._counting:
            self.seen += 1
            if self.seen == self._line:
                self._act()
        return self._trace


def copied(value: Any) -> Any:
    """Tensors as nested lists of what they hold, and the rest as it is, to be compared with ``==``."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, (list, tuple)) else value
