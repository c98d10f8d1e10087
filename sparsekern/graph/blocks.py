"""Residual blocks as channels: a block that is removed is one more unit with rows, a saliency and a cost.

The rows of a block are those of the parameters that make it the identity when they are zero. No dimension of
a tensor gets shorter with it; whole tensors go. The blocks of one list form a group. So the list keeps as
many of them as a group has to keep channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparsekern.graph.groups import Gates, Group, TensorSlots
from sparsekern.graph.numbers import KeptBlocks, after_removal


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block of a list of modules that is the identity when its writers are zero.

    Attributes:
        container: path of the list.
        index: the block's number in the list.
        size: number of modules in the list.
        channel: the channel id that stands for the block.
        writers: names of the parameters that have to be zero.
        tensors: names of all parameters and buffers of the block.
        groups: ids of the groups that run through tensors of the block alone.
    """

    container: str
    index: int
    size: int
    channel: int
    writers: tuple[str, ...]
    tensors: frozenset[str]
    groups: tuple[int, ...]

    @property
    def path(self) -> str:
        """Path of the block."""
        return f"{self.container}.{self.index}" if self.container else str(self.index)

    def has(self, module: str) -> bool:
        """Whether a module is the block or a part of it."""
        return module == self.path or module.startswith(f"{self.path}.")


def block_groups(blocks: Sequence[Block], first: int, taken: set[str]) -> tuple[Group, ...]:
    """One group for each list of blocks.

    Args:
        blocks: the blocks, with the channel ids of a list one after the other.
        first: id of the first of these groups.
        taken: names of the other groups.

    Returns:
        The groups. Their names are those of the lists.
    """
    found: dict[str, list[int]] = {}
    for block in blocks:
        found.setdefault(block.container, []).append(block.channel)
    groups = []
    for number, (container, channels) in enumerate(found.items()):
        name = container or "blocks"
        while name in taken:
            name += ":blocks"
        taken.add(name)
        ids = np.array(channels, np.int64)
        groups.append(Group(first + number, name, ids, (), (), (), of_blocks=True))
    return tuple(groups)


def groups_inside(groups: Iterable[Group], tensors: frozenset[str]) -> tuple[int, ...]:
    """The ids of the groups that run through some of ``tensors`` and no other tensor."""
    return tuple(
        group.id for group in groups if group.members and all(name in tensors for name, _ in group.members)
    )


def with_writers(
    tensors: Mapping[str, TensorSlots], writers: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
) -> dict[str, TensorSlots]:
    """The tensors, with those of ``writers`` among them, all of which have rows.

    Args:
        tensors: the tensors with channels, by name.
        writers: aliases and shapes of the writers of blocks, by name.
    """
    result = dict(tensors)
    for name, (aliases, shape) in writers.items():
        slots = result.get(name)
        if slots is None:
            slots = TensorSlots(name, aliases, shape, "parameter", (None,) * len(shape), None)
        row = slots.row_dim if slots.row_dim is not None else int(np.argmax(shape))
        channels = list(slots.channels)
        if channels[row] is None:
            channels[row] = np.full(shape[row], -1, np.int64)
        result[name] = replace(slots, row_dim=row, channels=tuple(channels))
    return result


def with_block_gates(gates: Gates, blocks: Sequence[Block], tensors: Mapping[str, TensorSlots]) -> Gates:
    """The gates, with those of blocks: all rows of their writers."""
    names = list(gates.names)
    numbers = {name: number for number, name in enumerate(names)}
    offsets, index, rows = [gates.offsets], [gates.tensors], [gates.rows]
    end = int(gates.offsets[-1])
    for block in blocks:
        for name in block.writers:
            if name not in numbers:
                numbers[name] = len(names)
                names.append(name)
            slots = tensors[name]
            assert slots.row_dim is not None
            size = slots.shape[slots.row_dim]
            index.append(np.full(size, numbers[name], np.int64))
            rows.append(np.arange(size, dtype=np.int64))
            end += size
        offsets.append(np.array([end], np.int64))
    return Gates(np.concatenate(offsets), np.concatenate(index), np.concatenate(rows), tuple(names))


def closed(blocks: Sequence[Block], groups: Sequence[Group], kept: np.ndarray) -> np.ndarray:
    """``kept`` without the channels of the groups inside of blocks that are not kept.

    Args:
        blocks: the blocks of a graph.
        groups: its groups.
        kept: which channels are kept, bool ``[C]``.

    Returns:
        bool ``[C]``.
    """
    result = kept.copy()
    for block in blocks:
        if not kept[block.channel]:
            for number in block.groups:
                result[groups[number].channels] = False
    return result


def emptied(blocks: Sequence[Block], groups: Sequence[Group], kept: np.ndarray) -> list[str]:
    """The names of groups that keep too few channels, apart from those inside of blocks that are not kept."""
    inside = {number for block in blocks if not kept[block.channel] for number in block.groups}
    least = least_kept(blocks, groups)
    return [
        group.name
        for group in groups
        if len(group.channels)
        and group.id not in inside
        and int(kept[group.channels].sum()) < least[group.id]
    ]


def least_kept(blocks: Sequence[Block], groups: Sequence[Group], wanted: Sequence[int] = ()) -> np.ndarray:
    """The smallest number of channels that every group has to keep, int64 ``[groups]``.

    This is at least one. A group of blocks may keep none if its list has other modules, which always stay.

    Args:
        blocks: the blocks of a graph.
        groups: its groups.
        wanted: larger numbers by group; for a group of blocks they count all modules of the list.
    """
    least = np.ones(len(groups), np.int64) if not len(wanted) else np.array(wanted, np.int64)
    sizes = {block.channel: block.size for block in blocks}
    for group in groups:
        if group.of_blocks and len(group.channels):
            least[group.id] -= sizes[int(group.channels[0])] - len(group.channels)
    return np.clip(least, 0, [len(group.channels) for group in groups])


def kept_blocks(blocks: Iterable[Block], kept: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The numbers of the modules that stay, for each list that loses blocks; ``kept`` is bool ``[C]``."""
    gone: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for block in blocks:
        if not kept[block.channel]:
            gone.setdefault(block.container, set()).add(block.index)
            sizes[block.container] = block.size
    return {path: tuple(n for n in range(sizes[path]) if n not in numbers) for path, numbers in gone.items()}


def restricted(
    blocks: Sequence[Block], kept: np.ndarray, renumbered: np.ndarray, names: KeptBlocks
) -> tuple[Block, ...]:
    """The blocks that stay, with new names and numbers.

    Args:
        blocks: the blocks.
        kept: which channels are kept, bool ``[C]``.
        renumbered: the new id of every channel, int64 ``[C]``.
        names: the modules of lists that stay.
    """
    return tuple(
        replace(
            block,
            container=renamed(block.container, names),
            index=int(renamed(block.path, names).rpartition(".")[2]),
            size=len(names.get(block.container, range(block.size))),
            channel=int(renumbered[block.channel]),
            writers=tuple(renamed(name, names) for name in block.writers),
            tensors=frozenset(renamed(name, names) for name in block.tensors),
        )
        for block in blocks
        if kept[block.channel]
    )


def renamed(name: str, names: KeptBlocks) -> str:
    """The name that something has after the removal, which is not a part of a removed block."""
    new = after_removal(name, names)
    assert new is not None, name
    return new


def renamed_group(group: Group, channels: np.ndarray, names: KeptBlocks) -> Group:
    """A group after the removal, with the ids ``channels``: without the tensors of removed blocks."""
    if not names:
        return replace(group, channels=channels)

    def pairs(given: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        moved = ((after_removal(name, names), dim) for name, dim in given)
        return tuple((name, dim) for name, dim in moved if name is not None)

    producers = tuple(n for name in group.producers if (n := after_removal(name, names)) is not None)
    return replace(
        group,
        channels=channels,
        producers=producers,
        members=pairs(group.members),
        consumers=pairs(group.consumers),
    )
