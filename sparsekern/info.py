"""What this installation consists of: the first thing in a bug report, and part of every run.json."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern.kernels import backends, native
from sparsekern.kernels.native.machine import cpu_name
from sparsekern.kernels.selfcheck import first_use

PACKAGE = Path(__file__).resolve().parent
COMPILE = "pip install -e . or python setup.py build_ext --inplace"

_VARIABLES = ("SPARSEKERN_BACKEND", "SPARSEKERN_CPU_ISA", "SPARSEKERN_NO_NATIVE", "SPARSEKERN_SELFCHECK")

# Packages that figures may depend on.
PACKAGES = ("torch", "numpy", "safetensors", "torchmetrics", "triton")


def machine() -> dict[str, Any]:
    """The machine, as far as figures depend on it."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
    }


def versions() -> dict[str, str | None]:
    """Versions by package, None for what is not installed."""
    found: dict[str, str | None] = {
        "sparsekern": sparsekern.__version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def collect() -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "versions": versions(),
        "machine": machine(),
        "backends": [
            {"name": name, "works": works, "detail": detail} for name, works, detail in backends.available()
        ],
        "forced": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "selfcheck": _selfchecks(),
        "cuda": _cuda(),
        "triton": _triton(),
        "package": {"path": str(PACKAGE), "shadows": _text(shadowed())},
    }


def missing_core(package: Path | None = None) -> str | None:
    """Why there is no compiled core, and the way to one; None where it is there.

    Args:
        package: the directory that `sparsekern` is imported from; default this one.
    """
    if native.load() is not None:
        return None
    package = package or PACKAGE
    other = shadowed(package)
    if other is not None:
        return (
            f"sparsekern: got {package}, a source tree without its compiled core, which hides the installed "
            f"package in {other}; start from another directory, or compile here: {COMPILE}"
        )
    if (package.parent / "setup.py").is_file() and native.reason != "SPARSEKERN_NO_NATIVE=1 is set":
        return f"sparsekern: got {package}, a source tree without its compiled core; compile it: {COMPILE}"
    return f"sparsekern: got {package} without its compiled core ({native.reason}), expected one with it"


def shadowed(package: Path | None = None, paths: Sequence[str] | None = None) -> Path | None:
    """An installed package with a compiled core that an imported one without hides; None if there is none.

    Args:
        package: the directory that `sparsekern` is imported from; default this one.
        paths: where Python looks for modules; default `sys.path`.
    """
    package = (package or PACKAGE).resolve()
    if has_core(package):
        return None
    for entry in sys.path if paths is None else paths:
        other = Path(entry or ".").resolve() / package.name
        if other != package and (other / "__init__.py").is_file() and has_core(other):
            return other
    return None


def has_core(package: Path) -> bool:
    """Whether a compiled core for this Python lies in the directory of a package."""
    folder = package / "kernels" / "native"
    return any((folder / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)


def lines(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What `collect` found as pairs of a name and a text."""
    machine, versions = info["machine"], info["versions"]
    pairs = [
        ("sparsekern", versions["sparsekern"]),
        ("python", f"{versions['python']} on {machine['system']} {machine['architecture']}"),
        ("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("isa", machine["isa"]),
        ("package", info["package"]["path"]),
    ]
    if info["package"]["shadows"] is not None:
        pairs.append(("warning", str(missing_core())))
    for backend in info["backends"]:
        state = "works" if backend["works"] else "does not work"
        pairs.append((f"backend {backend['name']}", f"{state}: {backend['detail']}"))
    pairs += [(f"self-check {c['backend']}", f"{c['device']}: {c['result']}") for c in info["selfcheck"]]
    pairs += [(name, f"{value} (environment)") for name, value in info["forced"].items()]
    pairs += [("torch", versions["torch"]), ("cuda", info["cuda"]), ("triton", info["triton"])]
    pairs += [(name, versions[name] or "not installed") for name in ("numpy", "safetensors")]
    return pairs


def _selfchecks() -> list[dict[str, str]]:
    """The result of the self-check of each backend on each GPU; nothing is run."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    pairs = [(torch.device("cuda", index), name) for index in range(count) for name in ("cuda", "triton")]
    return [
        {"backend": name, "device": str(device), "result": first_use.describe(name, device)}
        for device, name in pairs
        if backends.why_not(name, device) is None
    ]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _isa() -> str:
    return native.isa() or f"none ({native.reason})"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device is available"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # a triton that does not fit fails in many ways
        return f"not available ({type(error).__name__}: {error})"
