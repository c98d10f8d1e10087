"""Stored results of self-checks, one file for each combination of backend, its code, device and versions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekern.files.cache import CacheFile, directory
from sparsekern.files.schema import TEXT, Either, Fields, OneOf
from sparsekern.kernels.native import cuda_library

FORMAT = "sparsekern.selfcheck"
VERSION = 1

_KERNELS = Path(__file__).parents[1]
_DRIVER = Path("/proc/driver/nvidia/version")

_RULE = Fields({"failure": Either((TEXT, OneOf((None,))))}, others=None)


@dataclass(frozen=True)
class Outcome:
    """The result of a self-check.

    Attributes:
        failure: the first failed case and what was wrong; None if the backend passed.
    """

    failure: str | None


class Store:
    """The stored result of a backend on a device.

    Args:
        backend: name of the backend.
        device: the device.

    Attributes:
        settings: everything that the result depends on.
        path: the file, ``selfcheck-<digest of the settings>.json`` in the cache directory.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        self.settings = settings(backend, device)
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        self.path = directory() / f"selfcheck-{digest}.json"
        self._file = CacheFile(
            self.path,
            FORMAT,
            VERSION,
            contents="a self-check",
            unread="the self-check runs again",
            unwritten="the next process checks again",
            check=self._check,
        )

    def _check(self, document: Mapping[str, Any]) -> None:
        """Check the entries of a file.

        Raises:
            ValueError: they are not those of a self-check with these settings.
        """
        if document.get("settings") != self.settings:
            raise ValueError("its settings are others")
        _RULE.check({key: value for key, value in document.items() if key == "failure"}, "the file")

    def read(self) -> Outcome | None:
        """The stored result; None if there is none."""
        document = self._file.read()
        return Outcome(document["failure"]) if document else None

    def write(self, outcome: Outcome) -> None:
        """Store a result."""
        self._file.write({"settings": self.settings, "failure": outcome.failure})


def settings(backend: str, device: torch.device) -> dict[str, str]:
    """Everything that the result of a self-check depends on."""
    found = {
        "backend": backend,
        "code": _digest(_files(backend)),
        "sparsekern": _version("sparsekern"),
        "torch": torch.__version__,
        "device": device_name(device),
        "driver": _driver(),
    }
    return found | ({"triton": _version("triton")} if backend == "triton" else {})


def device_name(device: torch.device) -> str:
    """Name of a GPU with its compute capability; the type of any other device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _files(backend: str) -> tuple[Path, ...]:
    """The files whose content decides the results of a backend: Python's, and the compiled library."""
    library = cuda_library.path() if backend == "cuda" else None
    return *sorted(_KERNELS.rglob("*.py")), *([] if library is None else [library])


@functools.cache
def _digest(files: tuple[Path, ...]) -> str:
    """Digest of the content of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _driver() -> str:
    """Version of the GPU's driver: NVIDIA's own, else the version of CUDA that the driver supports."""
    try:
        return _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        of_torch = getattr(torch._C, "_cuda_getDriverVersion", None)
        return "unknown" if of_torch is None else str(of_torch())
