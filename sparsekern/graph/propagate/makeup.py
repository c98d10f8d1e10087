"""Which tensors make up for means over channels, and which attributes hold the epsilons beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.numbering import Numbering
from sparsekern.graph.propagate.records import Absorbed, Epsilon, Records
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.rescale import Rescale

Fault = tuple[np.ndarray, str]


def unsuitable(tensors: Sequence[Tracked], slots: Slots, records: Records) -> list[Fault]:
    """Find the means over channels for which no tensor makes up after all.

    A tensor makes up for a mean only if all ops of all modes read it in the same way.

    Args:
        tensors: the registered tensors.
        slots: all slots.
        records: the records of all graphs.

    Returns:
        (raw slot ids of the channels, reason) of every such mean.
    """
    found: list[Fault] = []
    for number, uses in _by_tensor(records).items():
        name = tensors[number].entry.names[0]
        first = uses[0]
        if number in records.otherwise:
            why = f"{records.otherwise[number]} also reads {name}"
        elif _dim(tensors[number], first, slots) is None:
            why = f"{name} has other channels"
        elif any(_way(use) != _way(first) for use in uses):
            why = f"{name} is used in two ways"
        else:
            continue
        found += [(use.average.ids, f"{use.average.reason}; {why}") for use in uses]
    return found


def follow(
    tensors: Sequence[Tracked],
    slots: Slots,
    numbering: Numbering,
    records: Records,
    holders: Mapping[Epsilon, str],
) -> list[Fault]:
    """Record in ``Tracked.rescale`` how tensors make up for means over channels.

    Args:
        tensors: the registered tensors, changed in place.
        slots: all slots.
        numbering: the numbers of channels and groups.
        records: the records of the settled interpretation.
        holders: paths of the attributes that hold the epsilons.

    Returns:
        (raw slot ids, reason) of the means whose epsilon no attribute holds.
    """
    found: list[Fault] = []
    counted: dict[str, np.ndarray] = {}
    for number, uses in _by_tensor(records).items():
        ids = uses[0].average.ids
        dim = _dim(tensors[number], uses[0], slots)
        if dim is None or (numbering.channel_of[ids[ids >= 0]] < 0).all():
            continue
        numbers: dict[str, float] = {}
        for use in uses:
            for index in use.average.epsilons:
                epsilon = records.epsilons[index]
                path, power = holders.get(epsilon), epsilon.average.exponent
                classes = np.sort(slots.find(epsilon.average.ids))
                known = path is None or np.array_equal(counted.setdefault(path, classes), classes)
                if path is None or not known or numbers.setdefault(path, power) != power:
                    found.append((ids, _unheld(use, epsilon, path)))
        factor, offset = uses[0].weight.factor, uses[0].weight.offset
        tensors[number].rescale = Rescale(
            dim, -uses[0].average.exponent, offset / factor, tuple(sorted(numbers.items()))
        )
    return found


def _unheld(use: Absorbed, epsilon: Epsilon, path: str | None) -> str:
    held = "no attribute of a module holds it" if path is None else f"{path} holds several of them"
    return f"{use.average.reason}: its epsilon {epsilon.number:g} has to follow their number, and {held}"


def _by_tensor(records: Records) -> dict[int, list[Absorbed]]:
    found: dict[int, list[Absorbed]] = {}
    for use in records.absorbed:
        found.setdefault(use.weight.tensor, []).append(use)
    return found


def _way(use: Absorbed) -> tuple[float, float]:
    return use.average.exponent, use.weight.offset / use.weight.factor


def _dim(tensor: Tracked, use: Absorbed, slots: Slots) -> int | None:
    """The dimension of the tensor that holds exactly the channels of the mean; None if none does."""
    wanted = np.sort(slots.find(use.average.ids))
    for dim, ids in enumerate(tensor.ids):
        if ids is not None and np.array_equal(np.sort(slots.find(ids)), wanted):
            return dim
    return None
