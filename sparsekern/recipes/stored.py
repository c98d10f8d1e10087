"""Rebuilding networks from model files that name their recipe."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.compact.store import Stored, fill
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.networks import NetworkSpec


def read_spec(stored: Stored) -> NetworkSpec:
    """The description of the network in a file.

    Raises:
        InputError: the file names no network, or this version cannot build it; the error names the file.
    """
    made_by = stored.made_by
    if made_by is None:
        raise InputError(
            f"path: got {stored.path!r}, which does not name the factory of its {stored.metadata['class']}, "
            f"expected a file that does; or call load(module, path) with the full-size network"
        )
    try:
        return NetworkSpec.from_json(made_by)
    except InputError as error:
        version = made_by.get("sparsekern") if isinstance(made_by, dict) else None
        raise InputError(
            f"path: got {stored.path!r} of sparsekern {version}, expected a network that this version can "
            f"build: {str(error).removeprefix('--')}"
        ) from None


def rebuild(stored: Stored) -> nn.Module:
    """The network of a file, on the CPU, as it was stored.

    Raises:
        InputError: see `read_spec`.
        ValueError: the tensors of the file do not fit the network that the file names.
    """
    spec = read_spec(stored)
    # The file gives all values, so the possibly large full-size network is built without memory.
    with torch.device("meta"):
        network = spec.build()
    return fill(network, stored)
