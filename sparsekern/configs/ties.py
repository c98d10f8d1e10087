"""What a configuration says about the widths of parts: which are equal, and which it accepts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsekern.configs.fields import Influence, Place, Skeleton, changed, class_of, fields_of, influence
from sparsekern.configs.fit import HEAD_SIZES, opened

# Widths of each part decided before, and combinations of them, with which a width has to be accepted.
_TRIED, _COMBINED = 3, 64
# A part may keep to every second, third or fourth of its widths, if so many are left.
_STRIDES, _LEFT = (2, 3, 4), 8


@dataclass(frozen=True)
class ByConfig:
    """What a configuration says about the widths of some parts.

    Attributes:
        numbers: a number for each part, equal where one field sets the widths.
        widths: for each number the widths, in rising order, that the configuration accepts, together with the
            smallest ones of the parts before; only for parts whose width is not free.
    """

    numbers: list[int]
    widths: dict[int, list[int]]


def by_config(model: nn.Module, parts: Sequence[Sequence[Place]], sizes: Sequence[int]) -> ByConfig:
    """Find the parts whose widths one field sets, such as those of T5's encoder and decoder.

    A field sets the width of parts if it changes sizes of theirs and no others.

    Args:
        model: a model with a configuration.
        parts: for each part all dimensions of tensors whose sizes are its width or a multiple of it.
        sizes: the width of each part.

    Returns:
        The result; all parts are free where the configuration does not make a model of these sizes.
    """
    free = ByConfig(list(range(len(parts))), {})
    kind, whole = class_of(model), Skeleton.of(model)
    try:
        config: Any = opened(kind, model.config, whole)
        made = Skeleton.made(kind, config)
    except ValueError:
        return free
    if made.differing(whole):
        return free
    owner = {place: number for number, part in enumerate(parts) for place in part}
    numbers, setting = free.numbers, list[Influence]()
    for field in fields_of(config, int):
        if field.rpartition(".")[2] in HEAD_SIZES:
            continue
        found = influence(kind, config, made, field)
        if found.slopes and found.slopes.keys() <= owner.keys():
            first = sizes[owner[next(iter(found.slopes))]]
            tied = {numbers[owner[place]] for place in found.slopes if sizes[owner[place]] == first}
            numbers = [min(tied) if number in tied else number for number in numbers]
            setting.append(found)
    fields: dict[int, dict[str, int]] = defaultdict(dict)
    for found in setting:
        for number in {numbers[owner[place]] for place in found.slopes}:
            fields[number][found.field] = found.value
    return ByConfig(numbers, _accepted(config, fields, sizes))


def _accepted(
    config: Any, fields: Mapping[int, Mapping[str, int]], sizes: Sequence[int]
) -> dict[int, list[int]]:
    """For each part the widths that the configuration accepts, if it does not accept all of them."""
    if not callable(getattr(config, "validate", None)) or not _accepts(config, {}):
        return {}
    accepted: dict[int, list[int]] = {}
    values: dict[int, dict[int, dict[str, int]]] = {}
    tried: dict[int, list[int]] = {}

    def fitting(number: int, tried: Mapping[int, list[int]]) -> list[int]:
        before = [[{}, *(values[n][width] for width in widths)] for n, widths in tried.items()]
        combined = [
            {name: value for part in parts for name, value in part.items()}
            for parts in itertools.islice(itertools.product(*before), _COMBINED)
        ]
        return [
            width
            for width, new in values[number].items()
            if all(_accepts(config, old | new) for old in combined)
        ]

    # The widest part first: its widths restrict those of the others, such as heads that divide a hidden size.
    for number in sorted(fields, key=lambda n: -sizes[n]):
        size, own = sizes[number], fields[number].items()
        values[number] = {
            width: {name: value * width // size for name, value in own}
            for width in range(1, size + 1)
            if all(value * width % size == 0 for _, value in own)
        }
        widths = fitting(number, tried)
        for other, stride in itertools.product(accepted if len(widths) < size else (), _STRIDES):
            # Fewer widths of one part may allow more of another: every second multiple of 6 allows 4 heads.
            fewer = accepted[other][stride - 1 :: stride]
            if fewer[-1:] != [sizes[other]] or len(fewer) < _LEFT:
                continue
            found = fitting(number, {**tried, other: fewer[:_TRIED]})
            if len(found) > len(widths):
                widths, accepted[other], tried[other] = found, fewer, fewer[:_TRIED]
        if len(widths) < size and size in widths:
            accepted[number] = widths
        tried[number] = widths[:_TRIED]
    return accepted


def _accepts(config: Any, values: dict[str, int]) -> bool:
    """Whether a configuration's own checks pass with other values of some fields."""
    try:
        changed(config, values).validate()
    except Exception:
        # The checks of a family may raise anything.
        return False
    return True
