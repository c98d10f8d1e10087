"""The names of the runtimes, the libraries that they need, and their versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Literal, get_args

import torch

Runtime = Literal["torch", "compile", "onnxruntime", "openvino"]

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

# The extra of this package and the modules of it that a runtime needs. OpenVINO reads ONNX files.
_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnxruntime": ("onnx", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": ("openvino", ("onnx", "onnxscript", "openvino")),
}


def check_runtime(runtime: object, argument: str = "runtime") -> Runtime:
    """Check the name of a runtime and that its libraries are installed.

    Args:
        runtime: the name.
        argument: name of ``runtime`` in messages.

    Raises:
        ValueError: there is no runtime of this name.
        ModuleNotFoundError: a library is missing; the message names the extra that installs it.
    """
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise ValueError(f"{argument}: got {runtime!r}, expected one of {', '.join(map(repr, RUNTIMES))}")
    require(runtime, argument)
    return runtime


def require(runtime: Runtime, argument: str = "runtime") -> None:
    """Check that the libraries of a runtime are installed.

    Raises:
        ModuleNotFoundError: a library is missing; the message names the extra that installs it.
    """
    extra, modules = _EXTRAS.get(runtime, ("", ()))
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"{argument}: got {runtime!r}, which needs {module}, expected it to be installed; run: "
                f'pip install "sparsekern[{extra}]"',
                name=module,
            )


def installed() -> list[Runtime]:
    """The runtimes whose libraries are installed, in the order of ``RUNTIMES``."""
    found: list[Runtime] = []
    for runtime in RUNTIMES:
        _, modules = _EXTRAS.get(runtime, ("", ()))
        if all(importlib.util.find_spec(module) is not None for module in modules):
            found.append(runtime)
    return found


def version(runtime: Runtime) -> str:
    """The version of the library that runs networks, such as that of onnxruntime."""
    return importlib.metadata.version(runtime) if runtime in _EXTRAS else torch.__version__
