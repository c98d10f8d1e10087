"""The dense and the compact network of a model file, for measurements of time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekern.compact.store import read
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.stored import read_spec, rebuild


def dense_and_compact(path: Path, size: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The networks of a file, in evaluation mode on the CPU, and an image for them.

    The dense network has random weights, on which times do not depend.

    Args:
        path: a `model.safetensors` of a training.
        size: height and width of the image, float32 `[1, 3, size, size]`.

    Raises:
        InputError: the file names no network, or `size` is no multiple of its stride.
        OSError: the file cannot be read.
        ValueError: the file is damaged.
    """
    stored = read(path)
    spec = read_spec(stored)
    if size % spec.stride:
        raise InputError(f"--size: got {size}, expected a multiple of {spec.stride} for {str(path)!r}")
    generator = torch.Generator().manual_seed(0)
    networks = {"dense": spec.build(), "compact": rebuild(stored)}
    for network in networks.values():
        network.eval()
    return networks, torch.randn(1, 3, size, size, generator=generator)
