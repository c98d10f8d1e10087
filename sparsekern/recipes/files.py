"""Output files that are complete or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it, flushed to disk, if the block succeeds.

    The temporary path keeps the suffix of `path`, since writers choose their format by it. If the
    process dies in the block, the old file stays as it was.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
