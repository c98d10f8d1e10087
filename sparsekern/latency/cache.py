"""Timings made before, in a file of their own for each machine, torch and setting that they depend on."""

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

FORMAT = "sparsekern.latency"
VERSION = 1
# What glibc's allocator reads: whether the memory of a tensor is made anew every time.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


# Of a hundred thousand timings; a file of this package is much shorter.
_LARGEST = 32 << 20

_TIME = Real(low=0)


def directory(given: str | os.PathLike[str] | None = None) -> Path:
    """Where timings are kept: ``given``, else ``$SPARSEKERN_CACHE``, else the user's cache directory.

    A user without a home has a directory of the system for temporary files.

    Raises:
        TypeError, ValueError: ``given`` is no name of a directory.
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


def settings(device: torch.device) -> dict[str, Any]:
    """Everything but an op's own shapes that its time depends on."""
    names = {"cpu": cpu_name, "cuda": lambda: torch.cuda.get_device_name(device)}
    found: dict[str, Any] = {
        "device": names.get(device.type, lambda: str(device))(),
        "torch": torch.__version__,
        "precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cpu":
        found |= {name: os.environ.get(name, "") for name in ALLOCATOR}
        return found | {"threads": torch.get_num_threads(), "onednn": torch.backends.mkldnn.is_available()}
    return found | {"cudnn_benchmark": torch.backends.cudnn.benchmark}


class Cache:
    """Seconds by what was timed, read from a file and written back to it.

    A file that cannot be read or written costs time and nothing else: there is one warning that names it.

    Attributes:
        path: the file, ``latency-<digest of the settings>.json``.
        seconds: by key; new entries are kept in memory until :meth:`save`.
    """

    def __init__(self, where: Path, device: torch.device) -> None:
        self._settings = settings(device)
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()[:12]
        self.path = where / f"latency-{digest}.json"
        self._warned = False
        self.seconds = self._load()

    def save(self) -> None:
        """Write everything, with what other processes have added to the file meanwhile."""
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
            self._warn(f"cannot be written ({error}); the next run measures again")

    def _load(self) -> dict[str, float]:
        try:
            with opened(self.path, "cache") as file:
                text = file.read(_LARGEST + 1)
            if len(text) > _LARGEST:
                raise ValueError(f"it is longer than {_LARGEST} bytes")
            return _seconds(parse_json(text))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"not a file of latencies ({error}); everything is measured anew")
            return {}

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"cache: {self.path}: {what}", stacklevel=4)


def _seconds(document: Any) -> dict[str, float]:
    """The timings of a file's content. ValueError if it is not what :meth:`Cache.save` wrote."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    if document.get("version") != VERSION:
        raise ValueError(f"its version is {document.get('version')!r}, expected {VERSION}")
    seconds = document.get("seconds")
    Entries(TEXT, _TIME).check(seconds, "seconds")
    return dict(seconds or {})
