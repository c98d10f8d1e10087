"""Integer attributes of the user's modules that count channels, after parts of tensors are removed."""

from __future__ import annotations

import copy
import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import nn

from sparsekern.graph.layers import Part


def own_numbers(module: nn.Module) -> dict[str, int]:
    """Find the integer attributes of a user's module that may count channels.

    The layers of torch and of sparsekern have none: ``sizes`` handles them by class. Attributes that
    every module has, names that start with ``__``, and attributes behind a property or another data
    descriptor are never counts.

    Args:
        module: any module.

    Returns:
        The positive integers in the module's ``__dict__``, by attribute name, and those of its records (see
        ``is_record``), by the names of both: ``config.num_attention_heads``.
    """
    if type(module).__module__.startswith(("torch.nn.", "sparsekern.nn.")):
        return {}
    found = {}
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE or is_guarded(module, name):
            continue
        if type(value) is int and value > 0:
            found[name] = value
        elif is_record(value):
            inside = vars(value).items()
            found |= {f"{name}.{n}": v for n, v in inside if type(v) is int and v > 0 and n[:1] != "_"}
    return found


def is_record(value: object) -> bool:
    """Whether ``value`` is plain data with attributes, such as a configuration that several modules share."""
    if isinstance(value, (type, nn.Module)) or not hasattr(value, "__dict__"):
        return False
    named = isinstance(value, (SimpleNamespace, Namespace))
    return named or dataclasses.is_dataclass(value) or callable(getattr(value, "to_dict", None))


def set_number(module: nn.Module, name: str, value: int) -> Callable[[], None]:
    """Set an attribute that ``own_numbers`` lists.

    A record may be shared by several modules, whose sizes may differ. So the module gets a copy of its own.

    Args:
        module: the module.
        name: the name of the attribute; with a dot for an attribute of a record.
        value: the new value.

    Returns:
        A function that restores the attribute.
    """
    own, _, inner = name.partition(".")
    before = vars(module)[own]
    after: Any = value
    if inner:
        after = copy.copy(before)
        vars(after)[inner] = value
    vars(module)[own] = after
    return partial(vars(module).__setitem__, own, before)


def find(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Find the module and the name of an attribute, which may be one of a record.

    Args:
        model: the model.
        path: path of the attribute.

    Returns:
        The innermost module on the path, and the rest of the path.
    """
    names = path.split(".")
    module, depth = model, 0
    for name in names[:-1]:
        inner = module._modules.get(name)
        if inner is None:
            break
        module, depth = inner, depth + 1
    return module, ".".join(names[depth:])


def is_guarded(module: nn.Module, name: str) -> bool:
    """Whether an attribute is none that a user sets: behind a data descriptor, or named ``__...``."""
    return name.startswith("__") or hasattr(getattr(type(module), name, None), "__set__")


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"training"}


def counts(model: nn.Module, parts: Iterable[Part]) -> list[tuple[nn.Module, str, int]]:
    """Find the new values of the attributes of the user's modules that count channels.

    Args:
        model: the model that holds the attributes.
        parts: parts of its tensors.

    Returns:
        (module, attribute, new value) of every attribute that changes.

    Raises:
        ValueError: ``model`` lacks such an attribute, its value does not match the size of the whole
            tensor, or two tensors ask for different values.
    """
    found: dict[str, tuple[nn.Module, str, int]] = {}
    for part in parts:
        for path, (dim, per) in part.sizes.items():
            if dim not in part.keep:
                continue
            module, attribute = find(model, path)
            value = own_numbers(module).get(attribute)
            if value is None or value * per != part.shape[dim]:
                raise ValueError(
                    f"plan: made for another model, {path!r} is no number in this one that counts the "
                    f"{part.shape[dim]} indices of a dimension by {per}"
                )
            new = module, attribute, part.new_shape[dim] // per
            if found.setdefault(path, new) != new:
                raise ValueError(
                    f"plan: {path!r} becomes {found[path][2]} by one tensor, {new[2]} by another"
                )
    return list(found.values())
