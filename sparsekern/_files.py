"""Files that are complete or absent, and hold no code."""

from __future__ import annotations

import os
import pickle
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` that takes its place, flushed to disk, once the block has written it.

    It keeps the suffix of ``path``, since writers choose their format by it. If the block fails it is
    removed; if the process dies in it, the old file stays as it was.
    """
    temporary = path.with_name(f".{path.stem[:64]}.{secrets.token_hex(6)}.tmp{path.suffix}")
    # Made here, so that the user's umask holds whatever mode the writer prefers.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    # The new name is on the disk only when the directory is; not every system can do that.
    with suppress(OSError):
        _flush(path.parent)


def target(path: str | os.PathLike[str]) -> Path:
    """Where a file of that name would be written: through symbolic links, so that the link stays.

    Raises:
        OSError: it is a directory or a device, or its directory does not exist; names ``path``.
    """
    found = Path(os.path.realpath(path))
    if os.path.isdir(found):
        raise IsADirectoryError(f"path: {os.fspath(path)!r} is a directory, expected a file name")
    if os.path.exists(found) and not os.path.isfile(found):
        # Replacing a device or a pipe would take it away from the system.
        raise OSError(f"path: {os.fspath(path)!r} is not a regular file")
    if not os.path.isdir(found.parent):
        raise FileNotFoundError(
            f"path: cannot write {os.fspath(path)!r}, {str(found.parent)!r} is not a directory"
        )
    return found


def read_plain(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote, of tensors and plain values alone, on the CPU; no code from it is run.

    Raises:
        OSError: the file cannot be read; names ``path``.
        ValueError: it is truncated or something else; names ``path``.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"path: cannot read {os.fspath(path)!r}: {error.strerror}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"path: {os.fspath(path)!r} cannot be read: {reason}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
