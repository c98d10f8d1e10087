"""A smaller model for a while: the traced copy with some of its slots gone, without memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .capture import Source
from .interpret import Tracked


@contextmanager
def shrunk(source: Source, tensors: Sequence[Tracked], gone: np.ndarray) -> Iterator[None]:
    """The source's copy with smaller tensors, and with the sizes that layers keep beside them.

    gone: bool per slot. The copy is as before when the context ends.
    """
    left = {id(t): _left(tensors[n], gone) for t, n in source.numbered()}
    made = {id(t): _smaller(source, t, left[id(t)]) for t, _ in source.numbered()}
    restore: list[tuple[dict[str, Any], str, Any]] = []
    for module in source.clone.modules():
        own = {
            n: left[id(t)]
            for n, t in (*module._parameters.items(), *module._buffers.items())
            if t is not None
        }
        for name, size in _sizes(module, own).items():
            restore.append((module.__dict__, name, module.__dict__[name]))
            module.__dict__[name] = size
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    restore.append((table, name, tensor))
                    table[name] = made[id(tensor)]
    for tensor in tensors:
        for path, dim, per in tensor.sizes:
            owner, _, name = path.rpartition(".")
            table = source.clone.get_submodule(owner).__dict__
            restore.append((table, name, table[name]))
            table[name] = len(_left(tensor, gone)[dim]) // per
    try:
        yield
    finally:
        for table, name, old in restore:
            table[name] = old


def _left(tensor: Tracked, gone: np.ndarray) -> list[np.ndarray]:
    """Per dimension the indices that stay."""
    return [
        np.arange(size) if ids is None else np.flatnonzero((ids < 0) | ~gone[ids])
        for size, ids in zip(tensor.entry.shape, tensor.ids, strict=True)
    ]


def _smaller(source: Source, tensor: Tensor, left: list[np.ndarray]) -> Tensor:
    with source.mode:
        small = torch.empty([len(k) for k in left], dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(small, tensor.requires_grad)
    return small


def _sizes(module: nn.Module, left: dict[str, list[np.ndarray]]) -> dict[str, int]:
    """New values of the attributes in which torch's layers repeat the shape of their weight."""
    held = left.get("weight", left.get("running_mean"))
    if held is None:
        return {}
    first, sizes = held[0], [len(k) for k in held]
    if isinstance(module, nn.modules.conv._ConvNd):
        old = module.in_channels if module.transposed else module.out_channels
        groups = len(np.unique(first // (old // module.groups)))
        outer, inner = sizes[0], sizes[1] * groups
        into, out = (outer, inner) if module.transposed else (inner, outer)
        return {"groups": groups, "in_channels": into, "out_channels": out}
    if isinstance(module, nn.GroupNorm):
        groups = len(np.unique(first // (module.num_channels // module.num_groups)))
        return {"num_groups": groups, "num_channels": sizes[0]}
    if isinstance(module, nn.Linear):
        return {"out_features": sizes[0], "in_features": sizes[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": sizes[0]}
    return {}
