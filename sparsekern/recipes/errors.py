"""Exceptions of the recipes: bad input, and a run stopped by a signal."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input; the message names the argument or file, the value, and the expectation."""


class Stopped(Exception):
    """A signal stopped a run before its last step.

    Attributes:
        code: exit code of the process, 128 plus the number of the signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def listing(faults: list[str], shown: int = 5) -> str:
    """The first `shown` faults in one line, and the number of the others."""
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more
