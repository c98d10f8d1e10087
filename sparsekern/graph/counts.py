"""Integer attributes of the user's modules that count channels, after parts of tensors are removed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sparsekern.graph.layers import Part


def own_numbers(module: nn.Module) -> dict[str, int]:
    """Find the integer attributes of a user's module that may count channels.

    The layers of torch and of sparsekern have none: ``sizes`` handles them by class. Attributes that
    every module has, names that start with ``__``, and attributes behind a property or another data
    descriptor are never counts.

    Args:
        module: Any module.

    Returns:
        The positive integers in the module's ``__dict__``, by attribute name.
    """
    if type(module).__module__.startswith(("torch.nn.", "sparsekern.nn.")):
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and value > 0 and name not in _OF_EVERY_MODULE and not is_guarded(module, name)
    }


def is_guarded(module: nn.Module, name: str) -> bool:
    """Whether an attribute is none that a user sets: behind a data descriptor, or named ``__...``."""
    return name.startswith("__") or hasattr(getattr(type(module), name, None), "__set__")


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"training"}


def counts(model: nn.Module, parts: Iterable[Part]) -> list[tuple[nn.Module, str, int]]:
    """Find the new values of the attributes of the user's modules that count channels.

    Args:
        model: The model that holds the attributes.
        parts: Parts of its tensors.

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
            owner, _, attribute = path.rpartition(".")
            try:
                module = model.get_submodule(owner)
            except AttributeError:
                raise ValueError(f"plan: made for another model, {path!r} is no number in this one") from None
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
