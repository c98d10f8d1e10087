"""Loads the CUDA library, mirrors its structs, and reads torch's current stream.

The library is a plain shared library with a C interface (``csrc/cuda/abi.h``). It is linked with its own
CUDA runtime, so it loads without a driver or a GPU, and one build works with every version of torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from ctypes import POINTER, Structure, c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekern.kernels import native
from sparsekern.kernels.options import FLAGS, NUMBERS
from sparsekern.kernels.rows import ROW_ARRAYS

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Number of each torch dtype in csrc/abi.h."""

DEVICE_TYPE = 2
"""DLPack's number for CUDA devices."""

REBUILD = "to build it again, run pip install . or (in a working tree) python setup.py build_ext --inplace"

NEVER_RUN = "compiled and tested in emulation, never run on a GPU"


class Shape(Structure):
    """``Shape`` of csrc/abi.h, field by field."""

    _fields_ = [(name, c_int64) for name in ("outer", "rows", "inner", "start")]


class Cut(Structure):
    """``Cut`` of csrc/cuda/abi.h, field by field."""

    _fields_ = [
        ("outer_step", c_int64),
        ("inner_step", c_int64),
        ("partial", c_int64),
        ("row_step", c_int32),
        ("pieces", c_int32),
        ("chunks", c_int32),
        ("lanes", c_int32),
    ]


class Hyper(Structure):
    """``Hyper`` of csrc/abi.h, field by field."""

    _fields_ = [*((name, c_double) for name in NUMBERS), *((name, c_int32) for name in FLAGS)]


class Scalar(Structure):
    """``Scalar`` of csrc/cuda/abi.h, field by field."""

    _fields_ = [("address", c_void_p), ("value", c_double), ("dtype", c_int32)]


class Call(Structure):
    """``Call`` of csrc/cuda/abi.h, field by field."""

    _fields_ = [
        ("shapes", c_void_p),
        ("cuts", c_void_p),
        ("addresses", c_char_p),
        ("partials", c_void_p),
        ("stream", c_void_p),
        ("hyper", Hyper),
        ("lr", Scalar),
        ("grad_scale", Scalar),
        ("found_inf", Scalar),
        ("tensors", c_int64),
        ("op", c_int32),
        ("dtype", c_int32),
        ("device", c_int32),
    ]


class Moments(Structure):
    """``Moments`` of csrc/cuda/abi.h, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("gate_offsets", "gate_rows", "sums", "dot", "dot_sq", "updates")),
        *((name, c_void_p) for name in ("pending", "ticket", "stream")),
        ("channels", c_int64),
        ("rows", c_int64),
        ("decay", c_double),
        ("device", c_int32),
    ]


class Norm(Structure):
    """``Norm`` of csrc/cuda/abi.h, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "residual", "grad", "out", "grad_residual", "weight", "bias")),
        *((name, c_void_p) for name in ("running_mean", "running_var", "mean", "var", "mask")),
        *((name, c_void_p) for name in ("grad_weight", "grad_bias", "scratch")),
        *((name, c_void_p) for name in ("threshold", "activity", "updates", "stream")),
        *((name, c_int64) for name in ("outer", "channels", "inner")),
        *((name, c_double) for name in ("eps", "tau", "decay", "momentum")),
        *((name, c_int32) for name in ("activation", "training", "dtype", "device")),
    ]


_STRUCTS = (Shape, Cut, Call, Moments)


@dataclass(frozen=True)
class Target:
    """A library and the devices that it serves.

    Attributes:
        library: the loaded library; None where there is none.
        device_type: torch's name of the devices, such as ``cuda``.
        dlpack_type: DLPack's number of the devices.
    """

    library: Any
    device_type: str
    dlpack_type: int


reason: str | None = None
"""Why :func:`load` returned None; None before the first call and when the library was loaded."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None where the package runs without it, and :data:`reason` says why."""
    global reason
    file = path()
    if file is None:
        reason = (
            "the CUDA kernels were not built at installation: no GPU was visible or nvcc was missing; "
            "with SPARSEKERN_CUDA=1 they are built without a GPU"
        )
        return None
    try:
        return bind(file)
    except (OSError, RuntimeError) as error:
        reason = str(error)
        return None


def path() -> Path | None:
    """The file of the library; None where it was not built."""
    files = [
        Path(__file__).with_name(f"_cuda_kernels{suffix}")
        for suffix in importlib.machinery.EXTENSION_SUFFIXES
    ]
    return next((file for file in files if file.is_file()), None)


def bind(path: Path) -> ctypes.CDLL:
    """Load the library from the file ``path`` and declare the types of its functions.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: the library was built from another version of this package.
    """
    library = ctypes.CDLL(str(path))
    try:
        return _typed(library)
    except (AttributeError, RuntimeError) as error:
        found = str(error).removeprefix(f"{path}: ")
        raise RuntimeError(
            f"{path}: got a library of another version ({found}), expected one built with this package; "
            f"{REBUILD}"
        ) from error


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the types of the functions of ``library`` and return it.

    Raises:
        AttributeError: a function is missing.
        RuntimeError: a struct has another size in the library.
    """
    library.sparsekern_cuda_sizes.argtypes = [POINTER(c_int64)]
    library.sparsekern_cuda_sizes.restype = None
    library.sparsekern_cuda_cut.argtypes = [POINTER(Shape), c_int64, c_int64, POINTER(Cut)]
    library.sparsekern_cuda_cut.restype = c_int64
    library.sparsekern_cuda_step.argtypes = [POINTER(Call)]
    library.sparsekern_cuda_moments.argtypes = [POINTER(Moments)]
    library.sparsekern_cuda_norm_scratch.argtypes = [c_int64] * 4
    library.sparsekern_cuda_norm_scratch.restype = c_int64
    library.sparsekern_cuda_norm_merges.argtypes = [c_int64] * 4
    library.sparsekern_cuda_norm_merges.restype = c_int64
    library.sparsekern_cuda_norm_forward.argtypes = [POINTER(Norm)]
    library.sparsekern_cuda_norm_backward.argtypes = [POINTER(Norm)]
    library.sparsekern_cuda_try.argtypes = [c_int32]
    library.sparsekern_cuda_error.argtypes = [c_int32]
    library.sparsekern_cuda_error.restype = c_char_p
    library.sparsekern_cuda_launches.restype = c_int64
    expected = [
        *map(ctypes.sizeof, _STRUCTS),
        len(ROW_ARRAYS) * ctypes.sizeof(ctypes.c_void_p),
        ctypes.sizeof(Norm),
    ]
    sizes = (c_int64 * len(expected))()
    library.sparsekern_cuda_sizes(sizes)
    if list(sizes) != expected:
        raise RuntimeError(f"its structs have {list(sizes)} bytes, not {expected}")
    return library


def why_not(index: int | None = None) -> str | None:
    """Reason why the CUDA kernels cannot run on a GPU of this machine; None when they can.

    Args:
        index: number of the GPU. No other GPU is touched, because a context takes hundreds of MB.
            None for the current GPU.
    """
    if native.load() is None:
        return str(native.reason)
    library = load()
    if library is None:
        return str(reason)
    problem = _problem(library, index)
    return None if problem is None else f"{problem} ({NEVER_RUN})"


def _problem(library: ctypes.CDLL, index: int | None) -> str | None:
    """Reason why torch or the GPU ``index`` cannot run ``library``; None when both can."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    code = library.sparsekern_cuda_try(torch.cuda.current_device() if index is None else index)
    return None if code == 0 else error_text(library, code)


def error_text(library: ctypes.CDLL, code: int) -> str:
    """Text for an error code of the library. Negative codes are the library's own, others are CUDA's."""
    if code < 0:
        return f"an address is missing (error {-code})"
    return f"{library.sparsekern_cuda_error(code).decode()} (CUDA error {code})"


def check(library: ctypes.CDLL, code: int, what: str) -> None:
    """Check the return code of a call.

    Args:
        code: the return code; 0 means success.
        what: the data of the call, for the error message.

    Raises:
        RuntimeError: ``code`` is not 0.
    """
    if code != 0:
        text = error_text(library, code)
        raise RuntimeError(f"the CUDA kernels could not be launched for {what}: {text}")


def stream(device: torch.device) -> int:
    """The handle of torch's current stream on ``device``."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream. An unused GPU stays without a context."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
