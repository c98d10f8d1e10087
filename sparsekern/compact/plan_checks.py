"""Checks of the values that pruning plans are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsekern.files.schema import describe, shorten


def check_shapes(claimed: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the tensors of a plan exist in a model with the same shapes.

    Args:
        claimed: shapes of the plan's tensors, by name.
        shapes: shapes of all tensors of the model, by name.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    missing = claimed.keys() - shapes.keys()
    if missing:
        raise ValueError(
            f"plan: got a plan for another model with {shorten(sorted(missing))}, expected only tensors that "
            f"this model has"
        )
    for name, shape in claimed.items():
        if shapes[name] != shape:
            raise ValueError(
                f"plan: got a plan for a model whose {name!r} has shape {list(shape)}, expected "
                f"{list(shapes[name])} as in this model"
            )


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_sizes(shape: object) -> tuple[int, ...]:
    """``shape`` as a tuple, or a ValueError if it is none of a tensor."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else None
    if sizes is None or not all(is_whole(size) and size >= 0 for size in sizes):
        raise ValueError(f"shape: got {describe(shape)}, expected sizes >= 0")
    return tuple(int(size) for size in sizes)


def check_mapping(name: str, value: Any, expected: str) -> Mapping[Any, Any]:
    """``value``, or a ValueError if it is no mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: got {describe(value)}, expected {expected}")
    return value


def check_size(path: object, size: object, shape: tuple[int, ...], left: tuple[int, ...]) -> None:
    """Raise a ValueError unless ``size`` counts whole units of a tensor of ``shape`` cut to ``left``."""
    if not isinstance(path, str) or not isinstance(size, tuple) or len(size) != 2:
        raise ValueError(f"sizes: got {describe(path)} -> {describe(size)}, expected str -> (dim, per)")
    dim, per = size
    fits = is_whole(dim) and is_whole(per) and 0 <= dim < len(shape) and per >= 1
    if not fits or left[dim] % per:
        raise ValueError(
            f"sizes: got {describe(path)} as dimension {describe(dim)} over {describe(per)} indices per "
            f"unit, expected whole units of a tensor of shape {shape} with "
            f"{left[dim] if fits else 'no'} indices left there"
        )


def expect(document: object, key: str, kind: type) -> Any:
    """The entry ``key`` of a JSON object, or a ValueError if it is not of this type."""
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"text: got {type(value).__name__} as {key!r}, expected {kind.__name__}")
    return value
