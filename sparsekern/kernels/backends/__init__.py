"""The choice of the backend that computes a step.

Each backend is a module with the functions of :mod:`~sparsekern.kernels.backends.reference`. The environment
variable ``SPARSEKERN_BACKEND`` forces a backend by name. It is read at the first step.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from sparsekern.kernels import native as _native
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.options import HYPER

# Backends for each device type, the preferred one first.
_DEVICES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
_NAMES = ("reference", "cpu", "cuda", "triton")


def choose(device: torch.device) -> ModuleType:
    """The backend for tensors on ``device``.

    Raises:
        ValueError: ``SPARSEKERN_BACKEND`` names an unknown backend.
        RuntimeError: ``SPARSEKERN_BACKEND`` names a backend that does not work on this machine.
    """
    return _choose(device.type)


@functools.cache
def _choose(device_type: str) -> ModuleType:
    forced = os.environ.get("SPARSEKERN_BACKEND")
    if forced:
        return _forced(forced, device_type)
    for name in _DEVICES.get(device_type, ("reference",)):
        reason = why_not(name, device_type)
        if reason is None:
            return _module(name)
        warnings.warn(f"sparsekern runs without its {name} backend: {reason}", stacklevel=3)
    raise AssertionError("the reference backend works everywhere")


def _forced(name: str, device_type: str) -> ModuleType:
    if name not in _NAMES:
        raise ValueError(f"SPARSEKERN_BACKEND: got {name!r}, expected one of {', '.join(_NAMES)}")
    reason = why_not(name, device_type)
    if reason is not None:
        raise RuntimeError(
            f"SPARSEKERN_BACKEND: got {name!r} for tensors on {device_type}, "
            f"expected a backend that works there: {reason}"
        )
    return _module(name)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def why_not(name: str, device_type: str) -> str | None:
    """Reason why backend ``name`` does not work for tensors on ``device_type``; None when it works."""
    if name == "reference":
        return None
    if name == "triton":
        return _why_not_triton(device_type)
    if device_type != name:
        return f"it takes tensors on {name}, not on {device_type}"
    reason = cuda_library.why_not() if name == "cuda" else None
    return reason if reason is not None else _why_not_core(needed=name == "cpu")


def _why_not_core(*, needed: bool) -> str | None:
    """Reason why the compiled core cannot be used; a missing core is one only where it is needed."""
    core = _native.load()
    if core is None:
        return str(_native.reason) if needed else None
    if core.HYPER != HYPER:
        return (
            f"the compiled core is of another version (it takes {', '.join(core.HYPER)}; expected "
            f"{', '.join(HYPER)}); {cuda_library.REBUILD}"
        )
    return None


def _why_not_triton(device_type: str) -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    # The cheap checks come first, because importing triton takes about a second.
    takes = "cpu" if _interprets() else "cuda"
    if device_type != takes:
        return f"it takes tensors on {takes}, not on {device_type}"
    if takes == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        _module("triton")
    except Exception as error:  # an incompatible triton fails in many ways
        return f"triton cannot be used ({type(error).__name__}: {error})"
    return None


def _interprets() -> bool:
    """Whether triton runs in its interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> list[tuple[str, bool, str]]:
    """``(name, whether it works on this machine, description or reason)`` of every backend."""
    where = "the CPU, interpreted" if _interprets() else "GPUs"
    devices = {"triton": "cpu" if _interprets() else "cuda"}
    texts = {
        "cpu": "native, tensors on the CPU",
        "cuda": f"native, tensors on NVIDIA GPUs; {cuda_library.NEVER_RUN}",
        "triton": f"Triton, tensors on {where}; compiled and tested in its interpreter, never run on a GPU",
    }
    found = [("reference", True, "plain torch, any device")]
    for name, text in texts.items():
        reason = why_not(name, devices.get(name, name))
        found.append((name, reason is None, text if reason is None else reason))
    return found


def reset() -> None:
    """Clear the cached choice, so that ``SPARSEKERN_BACKEND`` is read again."""
    _choose.cache_clear()
