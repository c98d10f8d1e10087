"""Directories for output files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .errors import InputError


def writable_directory(path: Path, argument: str) -> Path:
    """Creates directory `path` and proves that files can be written there.

    Raises:
        InputError: it cannot be created or written; names `argument`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{argument} {path} cannot be written ({reason}); expected a directory to write to"
        ) from error
    return path
