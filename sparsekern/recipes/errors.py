"""What the recipes raise for bad input and for a run that was asked to stop."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input; the message names the argument or file, what came, and what was expected."""


class Stopped(Exception):
    """A signal ended a run before its end.

    Attributes:
        code: exit code of the process, 128 plus the number of the signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def listing(faults: list[str], shown: int = 5) -> str:
    """The first few of many faults in one line, and how many more there are."""
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return "; ".join(faults[:shown]) + more
