"""Files in the user's cache directory. A file that cannot be read or written costs one warning."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekern.files.atomic import check_name, opened, parse_json, replacing

# Largest file to read in bytes, enough for about 100 000 timings; files of this package are much smaller.
_LARGEST = 32 << 20


def directory(given: str | os.PathLike[str] | None = None) -> Path:
    """The cache directory: ``given``, else ``$SPARSEKERN_CACHE``, else one in the user's cache directory.

    Without a home directory, it is a directory inside the system's directory for temporary files.

    Args:
        given: a directory, or None.

    Raises:
        TypeError: ``given`` is not a path.
        ValueError: ``given`` is not a valid name of a directory.
    """
    if given is not None:
        check_name(given, "cache")
    try:
        return _directory(given)
    except RuntimeError:  # neither $HOME nor an entry in the system's list of users
        return Path(tempfile.gettempdir()) / f"sparsekern-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def _directory(given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    if chosen := os.environ.get("SPARSEKERN_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sparsekern"


@dataclass
class CacheFile:
    """A JSON file in the cache directory, with a format and a version.

    Attributes:
        path: the file.
        format: text in the entry ``format``.
        version: number in the entry ``version``.
        contents: what the file holds, for warnings, such as ``latencies``.
        unread: what follows if the file cannot be read, for warnings.
        unwritten: what follows if it cannot be written, for warnings.
        check: raises ValueError if the other entries of a file are not as they should be.
    """

    path: Path
    format: str
    version: int
    contents: str
    unread: str
    unwritten: str
    check: Callable[[Mapping[str, Any]], None]
    _warned: bool = field(default=False, init=False)

    def read(self) -> dict[str, Any]:
        """The entries of the file; empty if it is missing or, with a warning, unreadable."""
        try:
            with opened(self.path, "cache") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ValueError(f"it is longer than {_LARGEST} bytes")
            return self._checked(parse_json(text))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"which is not a file of {self.contents} ({error}); {self.unread}")
            return {}

    def _checked(self, document: Any) -> dict[str, Any]:
        """The content of a file.

        Raises:
            ValueError: the content is not in the format that :meth:`write` writes.
        """
        if not isinstance(document, dict) or document.get("format") != self.format:
            raise ValueError(f"its format is not {self.format!r}")
        if document.get("version") != self.version:
            raise ValueError(f"its version is {document.get('version')!r}, expected {self.version}")
        self.check(document)
        return document

    def write(self, entries: Mapping[str, Any]) -> None:
        """Replace the file by one with these entries, format and version."""
        document = {"format": self.format, "version": self.version, **entries}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path, "cache") as temporary:
                temporary.write_text(json.dumps(document, indent=0, sort_keys=True) + "\n")
        except (OSError, ValueError) as error:
            self._warn(f"which cannot be written ({error}), expected a writable file; {self.unwritten}")

    def _warn(self, what: str) -> None:
        """Warn about the file, once per object."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"cache: got {self.path}, {what}", stacklevel=5)
