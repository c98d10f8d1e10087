"""Cache of timings, with one file for each combination of device, torch version and settings."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from sparsekern.files.atomic import check_name, opened, parse_json, replacing
from sparsekern.files.schema import TEXT, Entries, Real
from sparsekern.kernels.native.machine import cpu_name
from sparsekern.runtimes import Runtime, version

FORMAT = "sparsekern.latency"
VERSION = 1
# Variables of glibc's allocator. They decide whether it asks the system for memory for each large tensor.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


# Largest file to read in bytes, enough for about 100 000 timings; files of this package are much smaller.
_LARGEST = 32 << 20

_TIME = Real(low=0)


def directory(given: str | os.PathLike[str] | None = None) -> Path:
    """The directory of timings: ``given``, else ``$SPARSEKERN_CACHE``, else the user's cache directory.

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


def settings(device: torch.device, runtime: Runtime = "torch") -> dict[str, Any]:
    """All settings, apart from the shapes of an op, that its time in a runtime depends on."""
    names = {"cpu": cpu_name, "cuda": lambda: torch.cuda.get_device_name(device)}
    found: dict[str, Any] = {
        "device": names.get(device.type, lambda: str(device))(),
        "torch": torch.__version__,
        "precision": torch.get_float32_matmul_precision(),
    }
    if runtime != "torch":
        found |= {"runtime": runtime, "version": version(runtime)}
    if device.type == "cpu":
        found |= {name: os.environ.get(name, "") for name in ALLOCATOR}
        return found | {"threads": torch.get_num_threads(), "onednn": torch.backends.mkldnn.is_available()}
    return found | {"cudnn_benchmark": torch.backends.cudnn.benchmark}


class Cache:
    """Timings by key, read from a file and written back to it.

    A file that cannot be read or written causes one warning that names it; timings are then measured again.

    Args:
        where: the directory of the file.
        device: device of the timed ops.
        runtime: what they run in.

    Attributes:
        path: the file, ``latency-<digest of the settings>.json``.
        seconds: seconds by key; new entries stay in memory until :meth:`save`.
    """

    def __init__(self, where: Path, device: torch.device, runtime: Runtime = "torch") -> None:
        self._settings = settings(device, runtime)
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()[:12]
        self.path = where / f"latency-{digest}.json"
        self._warned = False
        self.seconds = self._load()

    def save(self) -> None:
        """Write all timings, including those that other processes have added to the file since."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self._settings,
            "seconds": self._load() | self.seconds,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path, "cache") as temporary:
                temporary.write_text(json.dumps(document, indent=0, sort_keys=True) + "\n")
        except (OSError, ValueError) as error:
            self._warn(
                f"which cannot be written ({error}), expected a writable file; the next run measures again"
            )

    def _load(self) -> dict[str, float]:
        """The timings in the file; empty if it is missing or, with a warning, unreadable."""
        try:
            with opened(self.path, "cache") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ValueError(f"it is longer than {_LARGEST} bytes")
            return _seconds(parse_json(text))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"which is not a file of latencies ({error}); all latencies are measured again")
            return {}

    def _warn(self, what: str) -> None:
        """Warn about the file, once per cache."""
        if not self._warned:
            self._warned = True
            warnings.warn(f"cache: got {self.path}, {what}", stacklevel=4)


def _seconds(document: Any) -> dict[str, float]:
    """The timings in a file's content.

    Raises:
        ValueError: the content is not in the format that :meth:`Cache.save` writes.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if document.get("version") != VERSION:
        raise ValueError(f"its version is {document.get('version')!r}, expected {VERSION}")
    seconds = document.get("seconds")
    Entries(TEXT, _TIME).check(seconds, "seconds")
    return dict(seconds or {})
