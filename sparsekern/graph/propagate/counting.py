"""Finding which of several attributes counts channels, where a program computes a size from them.

``split(self.num_heads * self.head_dim)`` cuts at the right place in a smaller network if one of the two
attributes follows the channels. The check of a smaller copy proves the choice that is made here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, Protocol

import numpy as np

from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.numbering import Numbering
from sparsekern.graph.propagate.values import Ids


class Source(NamedTuple):
    """An attribute of a module.

    Attributes:
        module: path of the module.
        name: name of the attribute.
        value: its value.
    """

    module: str
    name: str
    value: int

    @property
    def path(self) -> str:
        """The path of the attribute in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name


class Number(Protocol):
    """A number of the program that is computed from attributes.

    Attributes:
        sources: the attributes.
    """

    @property
    def sources(self) -> tuple[Source, ...]: ...
    def __int__(self) -> int: ...
    def computed(self, values: Mapping[Source, int]) -> int:
        """The number for other values of the attributes.

        Args:
            values: the values of all ``sources``.

        Returns:
            The number.
        """


class Finder:
    """Records in ``Tracked.sizes`` the attributes that computed sizes need.

    Args:
        tensors: the registered tensors, changed in place.
        numbering: the numbers of channels and groups.
        fixed: attributes that count positions that always stay.
    """

    def __init__(self, tensors: Sequence[Tracked], numbering: Numbering, fixed: Collection[Source]) -> None:
        self._tensors, self._numbering, self._fixed = tensors, numbering, fixed

    def fit(self, ids: Ids, number: Number) -> None:
        """Record the fewest attributes with which a number is right where one channel less is left.

        Attributes that are equal to the number of channels come first. A number that counts no channels has
        to stay if some of its attributes follow channels. Indices that stay may stand beside the channels.

        Args:
            ids: raw slot ids that the number counts, int64; None if it counts no channels.
            number: the number.
        """
        known = {source: place for source in number.sources if (place := self._place(source))}
        if ids is None and known:
            tensor, dim = next(iter(known.values()))
            own = tensor.ids[dim]
        else:
            own = ids
        free = None if own is None else own[self._numbering.channel_of[own] >= 0]
        channels = None if free is None else self._evenly(free)
        if free is None or channels is None or len(channels) < 2:
            return
        count = len(channels)
        wanted = int(number) if ids is None else len(ids) - len(free) // count
        follow = {source for source in known if self._counts(source, channels)}
        open_ = [
            s for s in number.sources if s not in known and s not in self._fixed and s.value % count == 0
        ]
        open_.sort(key=lambda source: source.value != count)
        for size in range(len(open_) + 1):
            for chosen in combinations(open_, size):
                values = {
                    s: _less(s.value, count) if s in follow or s in chosen else s.value
                    for s in number.sources
                }
                if abs(number.computed(values)) == abs(wanted):  # positions may count from the end
                    for source in chosen:
                        self._record(source, channels)
                    return

    def _evenly(self, ids: np.ndarray) -> np.ndarray | None:
        """The channels of some slots, if none stays and all channels have equally many."""
        channels, counts = np.unique(self._numbering.channel_of[ids], return_counts=True)
        even = len(ids) > 0 and (ids >= 0).all() and channels[0] >= 0 and (counts == counts[0]).all()
        return channels if even else None

    def _place(self, source: Source) -> tuple[Tracked, int] | None:
        """The tensor and dimension by which the attribute is counted already."""
        for tensor in self._tensors:
            for path, dim, _ in tensor.sizes:
                if path == source.path:
                    return tensor, dim
        return None

    def _counts(self, source: Source, channels: np.ndarray) -> bool:
        """Whether the attribute counts just these channels."""
        place = self._place(source)
        ids = None if place is None else place[0].ids[place[1]]
        held = None if ids is None else self._evenly(ids)
        return held is not None and np.array_equal(held, channels)

    def _record(self, source: Source, channels: np.ndarray) -> None:
        """Record that an attribute counts channels, by a tensor that holds just these."""
        for tensor, dim, size in self._holding(channels):
            if size % source.value == 0:
                tensor.sizes = (*tensor.sizes, (source.path, dim, size // source.value))
                return

    def _holding(self, channels: np.ndarray) -> Iterator[tuple[Tracked, int, int]]:
        for tensor in self._tensors:
            for dim, ids in enumerate(tensor.ids):
                held = None if ids is None else self._evenly(ids)
                if ids is not None and held is not None and np.array_equal(held, channels):
                    yield tensor, dim, len(ids)


def _less(number: int, channels: int) -> int:
    """What is left of a number of equal units of some channels without one of them."""
    return number // channels * (channels - 1)
