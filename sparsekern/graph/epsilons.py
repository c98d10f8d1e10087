"""Epsilons: attributes of modules that follow the number of channels that a mean runs over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sparsekern.graph.counts import is_guarded
from sparsekern.graph.layers import Part
from sparsekern.graph.rescale import grown

# Attribute of a module: for each of its epsilons the value and the number of channels before the first cut,
# and the value after the last one.
_BASES = "_sparsekern_bases"


def own_floats(module: nn.Module) -> dict[str, float]:
    """Find the attributes of a module that may be epsilons.

    Args:
        module: any module.

    Returns:
        The positive floats in the module's ``__dict__``, by attribute name. The ``eps`` of an RMSNorm
        that has none is the one that torch takes for the dtype of its weight.
    """
    found = {
        n: v for n, v in vars(module).items() if type(v) is float and v > 0 and not is_guarded(module, n)
    }
    if isinstance(module, nn.RMSNorm) and module.eps is None and module.weight is not None:
        found["eps"] = torch.finfo(module.weight.dtype).eps
    return found


def floats(model: nn.Module, parts: Iterable[Part]) -> list[tuple[nn.Module, str, float]]:
    """Find the new values of the epsilons that follow a mean over channels.

    Each value follows from the one of the whole model, which :func:`set_floats` notes, so that several
    cuts give the same bits as one.

    Args:
        model: the model that holds the attributes.
        parts: parts of its tensors.

    Returns:
        (module, attribute, new value) of every attribute that changes.

    Raises:
        ValueError: ``model`` lacks such an attribute, or two tensors ask for different values.
    """
    return [(module, attribute, value) for module, attribute, value, _ in _changes(model, parts)]


def set_floats(model: nn.Module, parts: Iterable[Part]) -> None:
    """Set the epsilons of ``model`` to what :func:`floats` finds, and note their values before.

    Args:
        model: the model that holds the attributes.
        parts: parts of its tensors.

    Raises:
        ValueError: see :func:`floats`.
    """
    for module, attribute, value, base in _changes(model, parts):
        # A new dict: a copy of the module may share the old one.
        vars(module)[_BASES] = {**vars(module).get(_BASES, {}), attribute: (*base, value)}
        vars(module)[attribute] = value


_Change = tuple[nn.Module, str, float, tuple[float, int]]


def _changes(model: nn.Module, parts: Iterable[Part]) -> list[_Change]:
    """(module, attribute, new value, (value, number of channels) before the first cut) of every epsilon."""
    found: dict[str, _Change] = {}
    for part in parts:
        rule = part.rescale
        if rule is None or rule.dim not in part.keep:
            continue
        whole, left = part.shape[rule.dim], part.new_shape[rule.dim]
        for path, power in rule.numbers:
            module, attribute = _holder(model, path)
            value = own_floats(module).get(attribute)
            if value is None:
                raise ValueError(f"plan: made for another model, {path!r} is no positive float in this one")
            base = _base(module, attribute, value, whole)
            new = module, attribute, grown(*base, left, power), base
            if found.setdefault(path, new) != new:
                raise ValueError(
                    f"plan: {path!r} becomes {found[path][2]} by one tensor, {new[2]} by another"
                )
    return list(found.values())


def _holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, attribute = path.rpartition(".")
    try:
        return model.get_submodule(owner), attribute
    except AttributeError:
        raise ValueError(f"plan: made for another model, {path!r} is no number in this one") from None


def _base(module: nn.Module, attribute: str, value: float, size: int) -> tuple[float, int]:
    """The value and the number of channels before the first cut; those of now if the user set the value."""
    number, whole, last = vars(module).get(_BASES, {}).get(attribute, (value, size, value))
    return (number, whole) if last == value else (value, size)
