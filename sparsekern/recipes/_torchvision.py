"""Importing a torchvision whose operators do not fit the installed torch.

A torchvision built for another torch (such as a CPU build beside a CUDA build) fails to import because two
operator schemas are missing. This module defines them, so the import succeeds; torchvision's networks need
none of its operators. It must be imported before any package that imports torchvision, and does nothing where
torchvision is not installed.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # a schema lives as long as its library object
_error: Exception | None = None  # the error of importing torchvision without the schemas

if find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a binary that does not fit raises errors of many types
        _error = error
        if isinstance(error, RuntimeError):
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for _schema in _SCHEMAS:
                _library.define(_schema)


def mismatch() -> str | None:
    """A text on why torchvision does not fit torch and how to repair it; None if it fits."""
    if _error is None:
        return None
    reason = " ".join(str(_error).split()) or type(_error).__name__
    return (
        f"torchvision: got {_version('torchvision')} beside torch {_version('torch')}, expected the build "
        f"that belongs to this torch ({reason}); install both in one command from the same index, or "
        "uninstall torchvision if nothing else needs it"
    )


def warn_of_mismatch(stacklevel: int = 2) -> None:
    """Warn that torchvision's operators do not work, before a package that uses them is imported."""
    text = mismatch()
    if text is not None:
        warnings.warn(text, stacklevel=stacklevel + 1)


def used_by(package: str) -> bool:
    """Whether a module of an imported top-level package refers to torchvision or to one of its objects."""
    own = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == package]
    values = [value for module in own for value in list(getattr(module, "__dict__", {}).values())]
    origins = (getattr(value, "__module__", None) or getattr(value, "__name__", None) for value in values)
    return package == "torchvision" or any(str(origin).startswith("torchvision") for origin in origins)


def blame(error: BaseException) -> str | None:
    """The text of `mismatch()` if torchvision caused an import error, else None."""
    seen: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(seen) < 20:
        seen.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    return mismatch() if any("torchvision" in text for text in seen) else None


@contextmanager
def blaming() -> Iterator[None]:
    """Replace an exception of the block's imports by one with the text of `mismatch()`, if it is the cause.

    Raises:
        ImportError: an import failed because of torchvision.
    """
    try:
        yield
    except Exception as error:
        reason = blame(error)
        if reason is None:
            raise
        raise ImportError(reason, name="torchvision") from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
