"""Loads the native module and reports its instruction set."""

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
"""Why :func:`load` returned None; None before the first call and when the module was loaded."""

exchanges: bool = False
"""Whether torch gives native code the addresses of tensors through DLPack.

If not, :mod:`sparsekern.kernels.native.pointers` reads them in Python.
"""


@functools.cache
def load() -> ModuleType | None:
    """The native module, ready for use.

    Returns:
        The module; None where the package runs without it, and :data:`reason` says why.

    Raises:
        ValueError: ``SPARSEKERN_CPU_ISA`` names an unknown instruction set, or one that this CPU lacks.
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
    """Instruction set of the kernels in use (``baseline``, ``v3``, ``v4``); None without native kernels."""
    module = load()
    return None if module is None else module.isa()


def native_call_count() -> int:
    """Number of lists of tensors that the native kernels have processed in this process."""
    module = load()
    return 0 if module is None else module.call_count()


def _address_of_parallel_for() -> int:
    """Address of ``torch_parallel_for``, the C function that runs work on torch's threads.

    Returns:
        0 where torch does not export the function; the kernels then use one thread.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        function = ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
