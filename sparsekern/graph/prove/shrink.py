"""A temporary smaller model: the traced copy without parts of its tensors, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.graph.capture.source import Source
from sparsekern.graph.counts import counts, set_number
from sparsekern.graph.epsilons import floats
from sparsekern.graph.layers import Part, sizes


@contextmanager
def shrunk(source: Source, parts: Mapping[int, Part]) -> Iterator[dict[int, int]]:
    """Give the source's copy smaller tensors and matching size attributes while the context lasts.

    Args:
        source: the source whose copy is changed. The copy is restored when the context ends.
        parts: the part that stays, by number of a tensor. Other tensors stay whole.

    Yields:
        The number of every tensor of the smaller copy, by ``id`` of the tensor.

    Raises:
        ValueError: the sizes of a layer cannot follow its tensors.
    """
    left = {id(source.held[n]): part for n, part in parts.items() if part.keep}
    made = {id(source.held[n]): _smaller(source, n, part) for n, part in parts.items() if part.keep}
    with ExitStack() as undo:
        # Counts are checked against the sizes of the whole model, so they come before any change.
        counted = counts(source.clone, parts.values())
        changes: list[tuple[nn.Module, str, Any]] = [*floats(source.clone, parts.values())]
        for name, module in source.clone.named_modules():
            changes += [(module, attribute, size) for attribute, size in sizes(name, module, left).items()]
        for module, attribute, size in changes:
            # Changes are undone in reverse order: two of them may concern one attribute.
            undo.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, size)
        for module, attribute, count in counted:
            undo.callback(set_number(module, attribute, count))
        for module in source.clone.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for key, tensor in table.items():
                    if id(tensor) in made:
                        undo.callback(table.__setitem__, key, tensor)
                        table[key] = made[id(tensor)]
            if isinstance(module, nn.RNNBase):
                # A recurrent layer reads its weights from this list.
                undo.callback(setattr, module, "_flat_weights", module._flat_weights)
                module._flat_weights = [made.get(id(tensor), tensor) for tensor in module._flat_weights]
        yield {id(made.get(id(tensor), tensor)): number for number, tensor in source.held.items()}


def _smaller(source: Source, number: int, part: Part) -> Tensor:
    """A smaller fake tensor with the same memory order of dimensions. It is cached: it holds no data."""
    key = number, part.new_shape
    if key not in source.smaller:
        tensor = source.held[number]
        strides, step = [1] * tensor.ndim, 1
        # From the innermost dimension outwards; of equal strides, beside a size of 1, the last one is inside.
        for dim in sorted(range(tensor.ndim), key=lambda dim: (tensor.stride(dim), -dim)):
            strides[dim], step = step, step * part.new_shape[dim]
        with source.mode:
            small = torch.empty_strided(part.new_shape, strides, dtype=tensor.dtype, device=tensor.device)
        parameter = isinstance(tensor, nn.Parameter)
        source.smaller[key] = nn.Parameter(small, tensor.requires_grad) if parameter else small
    return source.smaller[key]
