"""The one exception for what a user handed over and the recipes cannot use."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input; the message names the argument or file, what came, and what was expected."""
