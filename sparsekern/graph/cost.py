"""The cost of the kept channels in parameters, multiply-adds and bytes of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MEASURES = ("params", "macs", "activations")


@dataclass(frozen=True)
class Cost:
    """The cost of a network.

    Attributes:
        params: number of elements in all parameters.
        macs: multiply-adds in convolutions and matrix products of one evaluation-mode pass over the
            example inputs: half of the flops that ``torch.utils.flop_counter`` counts.
        activations: bytes of all tensors that this pass makes, except by views and in-place ops.
    """

    params: int
    macs: int
    activations: int


@dataclass(frozen=True, eq=False)
class Terms:
    """A sum of T terms, each ``scale`` times a product of K extents.

    The P pairs say which atom is part of which term.

    Attributes:
        scale: the scale of every term, int64 ``[T]``.
        factors: numbers of extents, int64 ``[T, K]``. The last extent, of size 1, is the padding.
        pair_atom: the atom of every pair, int64 ``[P]``.
        pair_term: the term of every pair, int64 ``[P]``.
        pair_share: indices of each factor that one channel of the atom takes, int64 ``[P, K]``.
    """

    scale: np.ndarray
    factors: np.ndarray
    pair_atom: np.ndarray
    pair_term: np.ndarray
    pair_share: np.ndarray

    def total(self, sizes: np.ndarray) -> int:
        """The value of the sum for extents of the given ``sizes``, int64 [E]."""
        return int((self.scale * sizes[self.factors].prod(axis=1)).sum())

    def savings(self, sizes: np.ndarray, atoms: int) -> np.ndarray:
        """Compute the saving of removing one channel of each atom.

        Args:
            sizes: the size of every extent, int64 ``[E]``.
            atoms: the number of atoms.

        Returns:
            The saving by atom, float64 ``[atoms]``.
        """
        factors = sizes[self.factors[self.pair_term]]
        saved = factors.prod(axis=1) - (factors - self.pair_share).prod(axis=1)
        weights = (self.scale[self.pair_term] * saved).astype(np.float64)
        return np.bincount(self.pair_atom, weights, minlength=atoms)


@dataclass(frozen=True, eq=False)
class Share:
    """The number of indices of each extent that one channel of each atom takes, a sparse matrix [E, A].

    Attributes:
        starts: the first entry of every extent, int64 [E + 1].
        atom: the atom of every entry, int64 ``[P]``.
        count: the number of indices of every entry, int64 ``[P]``.
        atoms: the number of atoms, A.
    """

    starts: np.ndarray
    atom: np.ndarray
    count: np.ndarray
    atoms: int

    @property
    def extent(self) -> np.ndarray:
        """The extent of every entry, int64 [P]."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def times(self, counts: np.ndarray) -> np.ndarray:
        """The size of every extent when the atoms have ``counts`` channels, int64 [E]."""
        sizes = np.zeros(len(self.starts) - 1, np.int64)
        np.add.at(sizes, self.extent, self.count * counts[self.atom])
        return sizes

    def entries(self, extents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the entries of some extents.

        Args:
            extents: numbers of extents, int64 ``[N]``.

        Returns:
            Numbers of the entries, and for each the index into ``extents`` that it belongs to.
        """
        lengths = self.starts[extents + 1] - self.starts[extents]
        owner = np.repeat(np.arange(len(extents)), lengths)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.starts[extents][owner] + within, owner

    def among(self, left: np.ndarray) -> Share:
        """The same matrix with only the atoms ``left`` (increasing, int64), which are renumbered."""
        new = np.full(self.atoms, -1, np.int64)
        new[left] = np.arange(len(left))
        stays = new[self.atom] >= 0
        before = np.concatenate([[0], np.cumsum(stays)])
        return Share(before[self.starts], new[self.atom[stays]], self.count[stays], len(left))


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs as polynomials of extents, each extent a weighted count of kept channels.

    Channels that count alike in every extent form an atom, so that no sum runs over channels.

    Attributes:
        atom_of: the atom of every channel, int64 ``[C]``.
        stays: the number of indices of every extent that always stay, int64 ``[E]``. The last extent is
            the constant 1.
        shares: the number of indices of an extent that one channel of an atom takes.
        terms: the polynomial of every measure in ``MEASURES``.
    """

    atom_of: np.ndarray
    stays: np.ndarray
    shares: Share
    terms: dict[str, Terms]

    @property
    def share(self) -> np.ndarray:
        """``shares`` as a matrix, int64 [E, A]."""
        dense = np.zeros((len(self.stays), self.shares.atoms), np.int64)
        dense[self.shares.extent, self.shares.atom] = self.shares.count
        return dense

    def cost(self, kept: np.ndarray) -> Cost:
        """The cost with the channels ``kept``, bool [C]."""
        sizes = self.sizes(kept)
        return Cost(*(self.terms[measure].total(sizes) for measure in MEASURES))

    def price(self, kept: np.ndarray, of: str) -> np.ndarray:
        """Compute the saving of removing each kept channel alone.

        Args:
            kept: which channels are kept, bool ``[C]``.
            of: the measure, one of ``MEASURES``.

        Returns:
            The saving of each channel, float64 ``[C]``; 0 for channels that are not kept.
        """
        savings = self.terms[of].savings(self.sizes(kept), self.shares.atoms)
        return np.where(kept, savings[self.atom_of], 0.0)

    def sizes(self, kept: np.ndarray) -> np.ndarray:
        """The size of every extent with the channels ``kept`` (bool [C]), int64 [E]."""
        counts = np.bincount(self.atom_of[kept], minlength=self.shares.atoms)
        sizes: np.ndarray = self.stays + self.shares.times(counts)
        return sizes

    def fixed(self, gone: np.ndarray) -> CostModel:
        """Make the model of the same costs with fewer removable channels.

        Args:
            gone: which channels leave the graph and always stay in the network, bool ``[C]``.

        Returns:
            The costs as a function of the other channels.
        """
        counts = np.bincount(self.atom_of[gone], minlength=self.shares.atoms)
        left, atom_of = np.unique(self.atom_of[~gone], return_inverse=True)
        stays, shares = self.stays + self.shares.times(counts), self.shares.among(left)
        terms = {m: make_terms(t.scale, t.factors, shares) for m, t in self.terms.items()}
        return CostModel(atom_of.astype(np.int64), stays, shares, terms)

    def restrict(self, kept: np.ndarray) -> CostModel:
        """The costs of the network that has only the channels ``kept`` (bool [C]) left."""
        return replace(self, atom_of=self.atom_of[kept])


def make_terms(scale: np.ndarray, factors: np.ndarray, shares: Share) -> Terms:
    """Make terms and find their pairs of atoms and terms.

    Args:
        scale: see ``Terms``.
        factors: see ``Terms``.
        shares: the number of indices of an extent that one channel of an atom takes.

    Returns:
        The terms.
    """
    entry, owner = shares.entries(factors.reshape(-1))
    term, factor = np.divmod(owner, factors.shape[1])
    pairs, inverse = np.unique(term * max(shares.atoms, 1) + shares.atom[entry], return_inverse=True)
    share = np.zeros((len(pairs), factors.shape[1]), np.int64)
    share[inverse.reshape(-1), factor] = shares.count[entry]
    pair_term, pair_atom = np.divmod(pairs, max(shares.atoms, 1))
    return Terms(scale, factors, pair_atom, pair_term, share)


class CostBuilder:
    """Collects extents and terms over a given number of channels.

    Args:
        num_channels: the number of channels, C.
    """

    def __init__(self, num_channels: int) -> None:
        self._channels = num_channels
        self._known: dict[bytes, int | None] = {}
        self._stays: list[int] = []
        self._members: list[tuple[np.ndarray, np.ndarray]] = []
        self._terms: dict[str, dict[tuple[int, ...], int]] = {m: {} for m in MEASURES}

    def add(self, measure: str, scale: int, factors: Sequence[np.ndarray]) -> None:
        """Add one term.

        Args:
            measure: one of ``MEASURES``.
            scale: the term's constant factor.
            factors: channel ids of the indices of each factor, int64, -1 for indices that stay.
        """
        numbers = []
        for channels in factors:
            number = self.extent(channels)
            if number is None:
                scale *= len(channels)
            else:
                numbers.append(number)
        key = tuple(sorted(numbers))
        terms = self._terms[measure]
        terms[key] = terms.get(key, 0) + scale

    def extent(self, channels: np.ndarray) -> int | None:
        """The number of the extent that counts these channels (int64, -1: stays).

        None if no index belongs to a channel, so that the size is constant.
        """
        key = channels.tobytes()
        if key not in self._known:
            live = channels[channels >= 0]
            if len(live):
                self._known[key] = len(self._members)
                self._members.append(np.unique(live, return_counts=True))
                self._stays.append(len(channels) - len(live))
            else:
                self._known[key] = None
        return self._known[key]

    def build(self, group_of: np.ndarray) -> CostModel:
        """Make the cost model from all terms added so far.

        Args:
            group_of: the group of every channel, int64 ``[C]``. An atom lies inside one group.

        Returns:
            The cost model.
        """
        atom_of = refine(group_of, self._members)
        atoms = int(atom_of.max()) + 1 if len(atom_of) else 0
        lengths, found = [], [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for channels, counts in self._members:
            own, first = np.unique(atom_of[channels], return_index=True)
            lengths.append(len(own))
            found.append((own, counts[first]))
        atom, count = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        # The last extent is the constant 1, which has no entries.
        starts = np.concatenate([[0], np.cumsum([*lengths, 0])]).astype(np.int64)
        shares = Share(starts, atom, count.astype(np.int64), atoms)
        stays = np.array([*self._stays, 1], np.int64)
        terms = {m: _table(t, len(self._members), shares) for m, t in self._terms.items()}
        return CostModel(atom_of, stays, shares, terms)


def _table(terms: dict[tuple[int, ...], int], one: int, shares: Share) -> Terms:
    width = max((len(key) for key in terms), default=0) or 1
    factors = np.full((len(terms), width), one, np.int64)
    for row, key in enumerate(terms):
        factors[row, : len(key)] = key
    return make_terms(np.array(list(terms.values()), np.int64), factors, shares)


def refine(labels: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Split classes so that the members of a class agree on every part.

    Two members agree on a part if both are outside, or if both are inside with equal marks.

    Args:
        labels: the class of every member, integers [N].
        parts: (members, marks) pairs of integer arrays of equal length.

    Returns:
        The new classes, int64 ``[N]``, numbered from 0 in the order of first appearance.
    """
    labels = labels.astype(np.int64, copy=True)
    fresh = int(labels.max(initial=-1)) + 1
    for members, marks in parts:
        marks = marks.astype(np.int64)
        keys = labels[members] * (int(marks.max(initial=0)) + 1) + marks
        distinct, inverse = np.unique(keys, return_inverse=True)
        labels[members] = fresh + inverse.reshape(-1)
        fresh += len(distinct)
    return first_appearance(labels)


def first_appearance(labels: np.ndarray) -> np.ndarray:
    """Renumber classes from 0 in the order in which they first appear, int64 [N]."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    numbered: np.ndarray = rank[inverse.reshape(-1)]
    return numbered
