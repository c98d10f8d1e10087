"""The native module: loading it, and what it found on this machine."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

reason: str | None = None
"""Why :func:`load` gave None; None while it has not been called or when it gave a module."""

exchanges: bool = False
"""Whether torch tells native code where tensors lie (else :mod:`sparsekern.kernels.native.pointers` does)."""


@functools.cache
def load() -> ModuleType | None:
    """The native module, ready for use, or None (and :data:`reason`) where the package runs without.

    Raises:
        ValueError: ``SPARSEKERN_CPU_ISA`` names no instruction set, or one that this machine lacks.
    """
    global reason, exchanges
    if os.environ.get("SPARSEKERN_NO_NATIVE") == "1":
        reason = "SPARSEKERN_NO_NATIVE=1 is set"
        return None
    try:
        module = importlib.import_module("sparsekern.kernels.native._C")
    except ImportError as error:
        reason = f"no native kernels: they were not built at installation ({error})"
        return None
    module.select_isa(os.environ.get("SPARSEKERN_CPU_ISA", ""))
    module.set_parallel_for(_address_of_parallel_for())
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is not None:
        exchanges = module.set_exchange(exchange, (torch.nn.Parameter, torch.Tensor))
    return module


def isa() -> str | None:
    """The instruction set of the kernels in use (``baseline``, ``v3``, ``v4``); None without them."""
    module = load()
    return None if module is None else module.isa()


def native_call_count() -> int:
    """How many lists of tensors the native kernels have worked on in this process."""
    module = load()
    return 0 if module is None else module.call_count()


def _address_of_parallel_for() -> int:
    """Address of the C function by which torch lends its threads; 0 (one thread) where torch has none."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        function = ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
