"""Loading a model file: into a network that the caller made, or one that the file says how to make."""

from __future__ import annotations

import os
from typing import overload

from torch import nn

from sparsekern.compact.store import Stored, fill, read
from sparsekern.distributed.tensors import unwrap
from sparsekern.files.atomic import check_name
from sparsekern.recipes.stored import read_spec, rebuild

Path = str | os.PathLike[str]


@overload
def load(module: nn.Module, path: Path) -> nn.Module: ...
@overload
def load(module: Path) -> nn.Module: ...
def load(module: nn.Module | Path, path: Path | None = None) -> nn.Module:
    """The network of a file that :func:`sparsekern.save` or ``sparsekern train`` wrote.

    With a module, the file is any that :func:`sparsekern.save` wrote. The result is a copy of ``module``,
    cut by the plan of the file and filled with the file's values. ``module`` is the full-size network as its
    factory makes it, on any device, ``meta`` included (the copy is then on the CPU); it stays as it is.
    Values come back bit by bit in the dtype they were saved in.

    With a path alone, the file has to name a network of :mod:`sparsekern.recipes` and its settings, as those
    of ``sparsekern train`` do. The network is built from these names and numbers, on the CPU, in evaluation
    mode.

    No code from the file is run, and nothing is imported that the file names.

    Args:
        module: the full-size network, or the path of a file that names its own.
        path: the file, after a module.

    Raises:
        TypeError: ``module`` is neither a module nor a path, ``path`` is not a file name, or there
            is one path too many or too few.
        OSError: the file cannot be read; names ``path``.
        ValueError: the file is damaged, was not written by :func:`sparsekern.save`, was changed since, or
            holds another network than ``module``; names ``path`` and the factory that the file names.
    """
    if isinstance(module, nn.Module):
        check_name(path)
        assert path is not None
        return _fill(unwrap(module), read(path))
    if not isinstance(module, (str, os.PathLike)):
        raise TypeError(
            f"module: got {type(module).__name__}, expected a torch.nn.Module, or the path of a file alone"
        )
    if path is not None:
        raise TypeError("module: got a path before a path, expected load(module, path) or load(path)")
    return rebuild(read(module)).eval()


def _fill(module: nn.Module, stored: Stored) -> nn.Module:
    try:
        return fill(module, stored)
    except ValueError as error:
        try:
            maker = read_spec(stored)
        except ValueError:  # there is no such entry, or it is of no use
            raise error from None
        raise ValueError(
            f"{error}; the file was made with {maker}; load({stored.path!r}) alone rebuilds it"
        ) from None
