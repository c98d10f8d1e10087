"""Facts about this machine."""

from __future__ import annotations

import platform
from pathlib import Path

# What a name leaves open: virtual machines of two generations are both called "AMD EPYC".
_GENERATION = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the CPU with its generation, such as ``AMD EPYC, family 26, model 2``.

    Args:
        cpuinfo: Linux's description of the CPUs; where it is missing or names none, ``platform`` does.
    """
    facts: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return ", ".join([name, *(f"{label} {facts[key]}" for key, label in _GENERATION.items() if key in facts)])
