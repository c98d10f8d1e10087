"""Results as JSON lines: one line a run, complete or not there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line, flushed to the disk. Half a line, left by a process that died, is cut off before."""
    line = (json.dumps(record) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Another run of the study may write to the same file.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        end = _complete(descriptor)
        os.ftruncate(descriptor, end)
        while line:
            written = os.pwrite(descriptor, line, end)
            line, end = line[written:], end + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(descriptor: int) -> int:
    """Bytes of the file up to the end of its last complete line."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).rfind(b"\n") + 1


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; none where there is no file.

    Raises:
        ValueError: a complete line is not a JSON object; names the file and the line.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is {line[:40]!r}, expected a JSON object")
        records.append(record)
    return records
