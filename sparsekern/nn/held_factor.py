"""Parameters that a module reads times a factor, while the parameter itself stays what it was.

A norm by a mean of squares that loses channels needs a larger weight. During a training, the optimizer goes
on with the weight, its gradient and its state as if no channel had gone. So the module reads
``(weight + offset) * factor - offset`` in place of the weight. :func:`fold_factors` writes that into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.distributed.tensors import is_sharded

# Attribute of a module: factor and offset by the name of a parameter.
_FACTORS = "_sparsekern_factors"


def scaled(tensor: Tensor, factor: float, offset: float = 0.0) -> Tensor:
    """``(tensor + offset) * factor - offset`` as a new tensor; autograd records it.

    Args:
        tensor: any floating-point tensor.
        factor: the factor.
        offset: the offset.

    Returns:
        A tensor of the same shape and dtype.
    """
    return tensor * factor + offset * (factor - 1) if offset else tensor * factor


def hold_factor(module: nn.Module, name: str, factor: float, offset: float = 0.0) -> None:
    """Let ``module`` read its parameter ``name`` times ``factor``, besides factors that it holds already.

    The parameter stays the same object under the same name. The module becomes of a subclass of its class.

    Args:
        module: the module that owns the parameter.
        name: the parameter's name in the module.
        factor: the factor.
        offset: the constant that the module adds to the parameter before it multiplies.
    """
    held = factors(module)
    before, _ = held.get(name, (1.0, offset))
    # A new dict: a copy of the module may share the old one.
    vars(module)[_FACTORS] = {**held, name: (before * factor, offset)}
    kind: Any = getattr(type(module), "_sparsekern_kind", type(module))
    module.__class__ = _holding(kind, tuple(sorted(factors(module))))


def factors(module: nn.Module) -> Mapping[str, tuple[float, float]]:
    """The factors that ``module`` holds, as (factor, offset) by the name of a parameter."""
    held: Mapping[str, tuple[float, float]] = vars(module).get(_FACTORS, {})
    return held


def holds_factors(model: nn.Module) -> bool:
    """Whether any module of ``model`` holds a factor."""
    return any(factors(module) for module in model.modules())


@torch.no_grad()
def fold_factors(model: nn.Module) -> None:
    """Multiply the held factors into the parameters of ``model``; its modules get their own classes back.

    Args:
        model: the model, changed in place.
    """
    done: set[int] = set()
    for module in model.modules():
        for name, (factor, offset) in factors(module).items():
            tensor = module._parameters[name]
            if tensor is not None and id(tensor) not in done:
                done.add(id(tensor))
                tensor.copy_(scaled(tensor, factor, offset))
        if factors(module):
            del vars(module)[_FACTORS]
            module.__class__ = getattr(type(module), "_sparsekern_kind", type(module))


@cache
def _holding(kind: Any, names: tuple[str, ...]) -> Any:
    """The subclass of ``kind`` whose instances read the parameters ``names`` times their factors."""
    members: dict[str, Any] = {name: property(_read(name)) for name in names}
    members |= {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "_sparsekern_kind": kind,
        "__reduce_ex__": lambda self, _: (_made_again, (kind, names), vars(self)),
    }
    return type(kind.__name__, (kind,), members)


def _read(name: str) -> Any:
    def read(self: nn.Module) -> Tensor | None:
        tensor = self._parameters[name]
        # Between forward passes ``fully_shard`` reads the parameter itself, whose part it keeps.
        return tensor if tensor is None or is_sharded(tensor) else scaled(tensor, *factors(self)[name])

    return read


def _made_again(kind: Any, names: tuple[str, ...]) -> nn.Module:
    """An empty instance of the subclass; ``pickle`` and ``copy`` fill it."""
    holding = _holding(kind, names)
    made: nn.Module = holding.__new__(holding)
    return made
