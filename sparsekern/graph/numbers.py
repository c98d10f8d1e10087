"""Names of tensors and modules before and after blocks are removed from numbered lists."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

KeptBlocks = Mapping[str, Sequence[int]]
"""The numbers of the blocks that stay, increasing, by the path that the list has before the removal."""


def after_removal(name: str, kept: KeptBlocks) -> str | None:
    """The name that something has after blocks are removed.

    Args:
        name: its name before, such as ``layers.4.mlp.weight``.
        kept: the blocks that stay.

    Returns:
        The new name; None if it belongs to a removed block.
    """
    before: list[str] = []
    after: list[str] = []
    for part in name.split("."):
        stay = kept.get(".".join(before))
        before.append(part)
        if stay is not None and part.isdecimal():
            place = bisect_left(stay, int(part))
            if place == len(stay) or stay[place] != int(part):
                return None
            part = str(place)
        after.append(part)
    return ".".join(after)


def before_removal(name: str, kept: KeptBlocks) -> str:
    """The name that something had before blocks were removed; the inverse of :func:`after_removal`."""
    before: list[str] = []
    for part in name.split("."):
        stay = kept.get(".".join(before))
        if stay is not None and part.isdecimal() and int(part) < len(stay):
            part = str(stay[int(part)])
        before.append(part)
    return ".".join(before)
