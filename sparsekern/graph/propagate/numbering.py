"""The classes of slots that are channels, and the numbers of channels and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsekern.graph.cost import refine
from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.records import Records
from sparsekern.graph.propagate.slots import Slots


@dataclass(frozen=True)
class Numbering:
    """The numbers of channels and groups.

    Attributes:
        channel_of: the channel of every slot, int64 ``[slots]``, -1 for slots that stay.
        group_of: the group of every channel, int64 ``[C]``.
        reasons: the number of the reason why a slot's class stays, int64 ``[slots]``, -1 if there is none.
    """

    channel_of: np.ndarray
    group_of: np.ndarray
    reasons: np.ndarray

    def slots_of(self, channels: np.ndarray) -> np.ndarray:
        """Find the slots of some channels.

        Args:
            channels: which channels, bool ``[C]``.

        Returns:
            Which slots belong to them, bool ``[slots]``.
        """
        chosen: np.ndarray = np.append(channels, False)[self.channel_of]
        return chosen


def row_ids(tensors: Sequence[Tracked], records: Records) -> list[np.ndarray]:
    """List the rows of all parameters.

    Args:
        tensors: the registered tensors.
        records: the records with the producers.

    Returns:
        Arrays of raw slot ids: first those of producers, in the order in which they run.
    """
    made = [ids for p in records.producers for ids in (p.rows, p.bias)]
    others = [t.ids[t.row_dim] for t in tensors if t.row_dim is not None]
    return made + [ids for ids in others if ids is not None]


def number(tensors: Sequence[Tracked], slots: Slots, records: Records) -> Numbering:
    """Number channels and groups.

    Channels are the free classes that hold at least one row of a parameter. Channels form one group if
    they run through the same dimensions of the same tensors. Groups, and channels in a group, come in
    the order of their first rows.

    Args:
        tensors: the registered tensors, with row dimensions.
        slots: all slots.
        records: the records with the producers.

    Returns:
        The numbers.
    """
    roots, reasons = slots.classes()
    rows = np.concatenate([np.empty(0, np.int64), *row_ids(tensors, records)])
    rows = rows[reasons[rows] < 0]
    # Classes come in the order of their first rows.
    classes, first = np.unique(roots[rows], return_index=True)
    classes = classes[np.argsort(first, kind="stable")]
    class_of = np.full(len(roots) + 1, -1, np.int64)
    class_of[classes] = np.arange(len(classes))
    of_slot = class_of[roots]
    parts = []
    for tensor in tensors:
        for ids in tensor.ids:
            inside = np.empty(0, np.int64) if ids is None else of_slot[ids]
            inside = np.unique(inside[inside >= 0])
            if len(inside):
                parts.append((inside, np.zeros(len(inside), np.int64)))
    group_of = refine(np.zeros(len(classes), np.int64), parts)
    order = np.argsort(group_of, kind="stable")
    channel = np.empty(len(classes) + 1, np.int64)
    channel[order] = np.arange(len(classes))
    channel[-1] = -1
    return Numbering(channel[of_slot], group_of[order], reasons)
