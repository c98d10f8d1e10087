"""Facts about this machine."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Model name of the CPU from ``/proc/cpuinfo``; elsewhere the name that ``platform`` gives."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
