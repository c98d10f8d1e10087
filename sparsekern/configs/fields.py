"""The numbers of a configuration, and the sizes that a model made from it has.

Nothing here imports transformers. A configuration is any object with ``to_dict`` and ``model_type`` that
makes a model by ``type(model)(config)``. A size follows from a number of the configuration if it changes with
it: the model is made from changed configurations on the meta device, without memory for its tensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsekern.distributed.tensors import is_fully_sharded

Place = tuple[str, int]
"""A dimension of a parameter or buffer, as (name, dimension)."""


def has_config(model: nn.Module) -> bool:
    """Whether a model has a configuration that makes models of its class."""
    return is_config(getattr(model, "config", None))


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that makes a model from its configuration, also if ``fully_shard`` gave it another."""
    if is_fully_sharded(model):
        # fully_shard derives a class from FSDPModule and the model's own class, in this order.
        own: type[nn.Module] = type(model).__bases__[-1]
        return own
    return type(model)


def is_config(value: object) -> bool:
    """Whether an object is a configuration like those of Hugging Face."""
    named = isinstance(getattr(value, "model_type", None), str) and not isinstance(value, type)
    return named and callable(getattr(value, "to_dict", None))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The sizes of a model.

    Attributes:
        shapes: shapes of all parameters and buffers, under each of their names.
        lengths: lengths of all lists of modules, by name.
        module: the model; its tensors may be on the meta device.
    """

    shapes: dict[str, tuple[int, ...]]
    lengths: dict[str, int]
    module: nn.Module

    @classmethod
    def of(cls, module: nn.Module) -> Skeleton:
        """The skeleton of a model."""
        tensors = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        lists = (nn.ModuleList, nn.Sequential)
        return cls(
            {name: tuple(tensor.shape) for name, tensor in tensors},
            {name: len(m) for name, m in module.named_modules() if isinstance(m, lists)},
            module,
        )

    @classmethod
    def made(cls, kind: type[nn.Module], config: Any) -> Skeleton:
        """The skeleton of the model of class ``kind`` that ``config`` makes, on the meta device.

        Raises:
            ValueError: the class cannot make a model from this configuration.
        """
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return cls.of(kind(copy.deepcopy(config)))
        except Exception as error:
            # A constructor may raise anything for numbers that do not go together.
            text = str(error).splitlines() or [""]
            raise ValueError(
                f"config: got one of which {kind.__name__} makes no model: {type(error).__name__}: {text[0]}"
            ) from error

    def places(self) -> set[Place]:
        """All dimensions of all tensors."""
        return {(name, dim) for name, shape in self.shapes.items() for dim in range(len(shape))}

    def differing(self, other: Skeleton) -> dict[Place, tuple[int, int]]:
        """The dimensions whose sizes differ, with both sizes; -1 for a tensor that one model lacks."""
        found: dict[Place, tuple[int, int]] = {}
        for name in (*self.shapes, *(n for n in other.shapes if n not in self.shapes)):
            ours, theirs = self.shapes.get(name), other.shapes.get(name)
            if ours is None or theirs is None or len(ours) != len(theirs):
                found[name, 0] = (-1 if ours is None else 1, -1 if theirs is None else 1)
                continue
            for dim, sizes in enumerate(zip(ours, theirs, strict=True)):
                if sizes[0] != sizes[1]:
                    found[name, dim] = sizes
        return found


def value_of(config: Any, field: str) -> Any:
    """The value of a field; nested configurations have fields such as ``text_config.hidden_size``."""
    for part in field.split(".") if field else ():
        config = getattr(config, part, None)
    return config


def changed(config: Any, values: dict[str, Any]) -> Any:
    """A copy of a configuration with other values of some fields.

    Raises:
        ValueError: the configuration refuses a value.
    """
    config = copy.deepcopy(config)
    for field, value in values.items():
        *path, name = field.split(".")
        owner = value_of(config, ".".join(path))
        try:
            setattr(owner, name, value)
        except Exception as error:
            raise ValueError(f"config: {name}={value!r} is refused: {error}") from error
    return config


def fields_of(config: Any, kind: type | tuple[type, ...]) -> Iterator[str]:
    """The public fields with values of exactly this type, or these types, in nested configurations too."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for name, value in list(vars(config).items()):
        if name.startswith("_"):
            continue
        if is_config(value):
            yield from (f"{name}.{inner}" for inner in fields_of(value, kind))
        elif type(value) in kinds:
            yield name


@dataclass(frozen=True, eq=False)
class Influence:
    """The sizes that change with a field.

    Attributes:
        field: the field.
        value: its value.
        slopes: the change of each size per change of the field.
    """

    field: str
    value: int
    slopes: dict[Place, float]


def influence(kind: type[nn.Module], config: Any, made: Skeleton, field: str) -> Influence:
    """The sizes that change with a field, from models with the field doubled, halved, or a little smaller.

    Args:
        kind: the class of the model.
        config: its configuration.
        made: the skeleton that ``config`` makes.
        field: a field with a whole number >= 1.

    Returns:
        Sizes of tensors that every one of these models has. No size changes where none can be made.
    """
    value = value_of(config, field)
    for other in (2 * value, value // 2, value + 1, value - 1):
        if other < 1 or other == value:
            continue
        try:
            found = made.differing(Skeleton.made(kind, changed(config, {field: other})))
        except ValueError:
            continue
        sizes = {place: pair for place, pair in found.items() if min(pair) >= 0}
        return Influence(
            field, value, {place: (new - old) / (other - value) for place, (old, new) in sizes.items()}
        )
    return Influence(field, value, {})
