"""The choice of the backend that computes a step.

Each backend is a module with the functions of :mod:`~sparsekern.kernels.backends.reference`. The environment
variable ``SPARSEKERN_BACKEND`` forces a backend by name. It is read at the first step. A backend for GPUs is
compared with the reference at its first use; ``SPARSEKERN_SELFCHECK=0`` turns that off.
"""

from __future__ import annotations

import importlib.util
import os
import threading
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
# Backends that are compared with the reference at their first use, by device type.
_CHECKED = {"cuda": ("cuda", "triton")}

_NAMES = ("reference", "cpu", "cuda", "triton")


# The backend of each device whose choice is final.
_chosen: dict[torch.device, ModuleType] = {}

# Warnings that were given, because several devices may have the same reason.
_warned: set[str] = set()

_lock = threading.RLock()


def choose(device: torch.device) -> ModuleType:
    """The backend for tensors on ``device``.

    At the first call for a GPU, each candidate is checked on it, see
    :mod:`~sparsekern.kernels.selfcheck.first_use`. A check that cannot run now, because a CUDA graph is being
    captured or a call is being traced, runs at a later call; until then the backend is used unchecked.

    Raises:
        ValueError: ``SPARSEKERN_BACKEND`` names an unknown backend.
        RuntimeError: ``SPARSEKERN_BACKEND`` names a backend that does not work on this machine or fails its
            self-check, or a self-check left the device unusable.
    """
    backend = _chosen.get(device)
    return _choose(device) if backend is None else backend


def _choose(device: torch.device) -> ModuleType:
    with _lock:
        if device in _chosen:
            return _chosen[device]
        forced = os.environ.get("SPARSEKERN_BACKEND")
        backend, is_final = _forced(forced, device) if forced else _first_that_works(device)
        if is_final:
            _chosen[device] = backend
        return backend


def _first_that_works(device: torch.device) -> tuple[ModuleType, bool]:
    """The preferred backend of those that work on ``device``, and whether the choice is final."""
    for name in _DEVICES.get(device.type, ("reference",)):
        reason = why_not(name, device)
        if reason is None:
            reason, is_final = _verdict(name, device)
            if reason is None:
                return module(name), is_final
        _warn_once(f"sparsekern runs without its {name} backend: {reason}")
    raise AssertionError("the reference backend works everywhere")


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=5)


def _forced(name: str, device: torch.device) -> tuple[ModuleType, bool]:
    """The backend ``name``, and whether the choice is final.

    Raises:
        ValueError, RuntimeError: see :func:`choose`.
    """
    if name not in _NAMES:
        raise ValueError(f"SPARSEKERN_BACKEND: got {name!r}, expected one of {', '.join(_NAMES)}")
    reason = why_not(name, device)
    if reason is not None:
        raise RuntimeError(
            f"SPARSEKERN_BACKEND: got {name!r} for tensors on {device.type}, "
            f"expected a backend that works there: {reason}"
        )
    refusal, is_final = _verdict(name, device)
    if refusal is not None:
        raise RuntimeError(
            f"SPARSEKERN_BACKEND: got {name!r} for tensors on {device}, expected a backend that equals the "
            f"reference: {refusal}; SPARSEKERN_SELFCHECK=0 uses it unchecked"
        )
    return module(name), is_final


def _verdict(name: str, device: torch.device) -> tuple[str | None, bool]:
    """Why a self-check refuses a backend on a device, None if it does not; and whether that is final."""
    if not is_checked(name, device):
        return None, True
    # Only processes with a GPU import the problems.
    first_use = importlib.import_module("sparsekern.kernels.selfcheck.first_use")
    refusal, is_final = first_use.verdict(name, module(name), device)
    return refusal, is_final


def compiled(device: torch.device) -> tuple[str, ...]:
    """Names of the backends for tensors on ``device`` that are not the reference, the preferred one first."""
    names = _DEVICES.get(device.type, ())
    # In its interpreter Triton takes tensors on the CPU.
    extra = ("triton",) if device.type == "cpu" and _interprets() else ()
    return tuple(name for name in (*names, *extra) if name != "reference")


def is_checked(name: str, device: torch.device) -> bool:
    """Whether a backend is compared with the reference at its first use on ``device``."""
    return name in _CHECKED.get(device.type, ())


def module(name: str) -> ModuleType:
    """The module of a backend that works."""
    return importlib.import_module(f"{__name__}.{name}")


def why_not(name: str, device: torch.device | str) -> str | None:
    """Reason why backend ``name`` does not work for tensors on ``device``; None when it works.

    Args:
        name: name of the backend.
        device: a device, or a device type for its current device.
    """
    device = torch.device(device)
    if name == "reference":
        return None
    if name == "triton":
        return _why_not_triton(device.type)
    if device.type != name:
        return f"it takes tensors on {name}, not on {device.type}"
    reason = cuda_library.why_not(device.index) if name == "cuda" else None
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
        module("triton")
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
    """Clear the cached choices, so that ``SPARSEKERN_BACKEND`` is read again."""
    with _lock:
        _chosen.clear()
        _warned.clear()
