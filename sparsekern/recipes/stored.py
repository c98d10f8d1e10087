"""Networks out of model files that say which recipe made them."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.compact.store import Stored, fill
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.networks import NetworkSpec


def read_spec(stored: Stored) -> NetworkSpec:
    """Which network of the recipes a file holds.

    Raises:
        InputError: the file does not say it, or says what this version cannot build; names the file.
    """
    made_by = stored.made_by
    if made_by is None:
        raise InputError(
            f"path: {stored.path!r} does not say which factory makes its {stored.metadata['class']}; "
            "expected load(module, path) with the full-size network as its factory makes it"
        )
    try:
        return NetworkSpec.from_json(made_by)
    except InputError as error:
        version = made_by.get("sparsekern") if isinstance(made_by, dict) else None
        raise InputError(
            f"path: {stored.path!r} names a network that cannot be built here (written by sparsekern "
            f"{version}): {str(error).removeprefix('--')}"
        ) from None


def rebuild(stored: Stored) -> nn.Module:
    """The network of a file, on the CPU, as it was stored.

    Raises:
        InputError: see `read_spec`.
        ValueError: the tensors of the file are not those of the network that it names.
    """
    spec = read_spec(stored)
    # The file has all values: the full-size network, which may be large, needs none.
    with torch.device("meta"):
        network = spec.build()
    return fill(network, stored)
