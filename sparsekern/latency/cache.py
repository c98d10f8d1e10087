"""Cache of timings, with one file for each combination of device, torch version and settings."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from sparsekern.files.cache import CacheFile
from sparsekern.files.schema import TEXT, Entries, Real
from sparsekern.kernels.native.machine import cpu_name
from sparsekern.runtimes import Runtime, version

FORMAT = "sparsekern.latency"
VERSION = 1
# Variables of glibc's allocator. They decide whether it asks the system for memory for each large tensor.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


_SECONDS = Entries(TEXT, Real(low=0))


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
        self._file = CacheFile(
            self.path,
            FORMAT,
            VERSION,
            contents="latencies",
            unread="all latencies are measured again",
            unwritten="the next run measures again",
            check=lambda document: _SECONDS.check(document.get("seconds"), "seconds"),
        )
        self.seconds = self._load()

    def save(self) -> None:
        """Write all timings, including those that other processes have added to the file since."""
        self._file.write({"settings": self._settings, "seconds": self._load() | self.seconds})

    def _load(self) -> dict[str, float]:
        """The timings in the file; empty if it is missing or, with a warning, unreadable."""
        return dict(self._file.read().get("seconds") or {})
