"""The copy of a model on fake tensors, and the list of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekern.distributed.tensors import copy_module, fake, settle
from sparsekern.graph.capture.program import Registered
from sparsekern.nn import MultiheadAttention


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of a model on fake tensors.

    Args:
        model: the model. It does not change.
        mode: the mode of the fake tensors.

    Raises:
        ValueError: the model cannot be copied or has uninitialised parameters.
    """
    memo: dict[int, Any] = {}
    settle(model)
    for name, tensor in _all_tensors(model):
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"model: parameter {name!r} is not initialised yet, expected a model that has been run once"
            )
        if id(tensor) not in memo:
            memo[id(tensor)] = fake(tensor, mode)
    try:
        clone = copy_module(model, memo, partial(mode.from_tensor, static_shapes=True))
    except Exception as error:
        raise ValueError(
            f"model: {type(model).__name__} cannot be copied for tracing: {type(error).__name__}: {error}"
        ) from error
    for module in clone.modules():
        # This class computes the same as torch's attention, in a form from which heads can be removed.
        if MultiheadAttention.fits(module):
            MultiheadAttention.adopt(module)
    return clone


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def registered(clone: nn.Module) -> tuple[tuple[Registered, ...], dict[int, Tensor]]:
    """Descriptions and tensors of the copy's parameters and buffers, by number. A tied tensor counts once."""
    names: dict[int, list[str]] = {}
    held: dict[int, Tensor] = {}
    for name, tensor in _all_tensors(clone):
        names.setdefault(id(tensor), []).append(name)
        held[id(tensor)] = tensor
    tensors = tuple(
        Registered(
            tuple(names[key]),
            tuple(tensor.shape),
            isinstance(tensor, nn.Parameter),
            tensor.element_size(),
        )
        for key, tensor in held.items()
    )
    return tensors, dict(enumerate(held.values()))
