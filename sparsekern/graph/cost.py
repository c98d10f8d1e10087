"""What kept channels cost, in parameters, multiply-adds and bytes of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MEASURES = ("params", "macs", "activations")


@dataclass(frozen=True)
class Cost:
    """params: numbers in all parameters. macs: multiply-adds of one evaluation-mode pass over the
    example inputs in convolutions and matrix products (half of what
    ``torch.utils.flop_counter`` counts as flops). activations: bytes of all tensors that this
    pass makes, except by views and in-place ops."""

    params: int
    macs: int
    activations: int


@dataclass(frozen=True, eq=False)
class Terms:
    """A sum of ``scale`` times a product of extents. factors: int64 [T, K], numbers of extents
    (the last one, of size 1, pads). The pairs say which atom is part of which term: atom [P],
    term [P], and how much of each factor one channel of the atom is [P, K]."""

    scale: np.ndarray
    factors: np.ndarray
    pair_atom: np.ndarray
    pair_term: np.ndarray
    pair_share: np.ndarray

    def total(self, sizes: np.ndarray) -> int:
        return int((self.scale * sizes[self.factors].prod(axis=1)).sum())

    def savings(self, sizes: np.ndarray, atoms: int) -> np.ndarray:
        """What one channel less of each atom saves, float64 [atoms]."""
        factors = sizes[self.factors[self.pair_term]]
        saved = factors.prod(axis=1) - (factors - self.pair_share).prod(axis=1)
        weights = (self.scale[self.pair_term] * saved).astype(np.float64)
        return np.bincount(self.pair_atom, weights, minlength=atoms)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs as polynomials of extents, each extent a weighted count of kept channels.

    Channels that count alike in every extent form an atom, so that no sum runs over channels.
    atom_of: int64 [C]. stays: int64 [E], indices that never go; the last extent is the constant
    1. share: int64 [E, A], how many indices one channel of an atom is. terms: by measure.
    """

    atom_of: np.ndarray
    stays: np.ndarray
    share: np.ndarray
    terms: dict[str, Terms]

    def cost(self, kept: np.ndarray) -> Cost:
        sizes = self.sizes(kept)
        return Cost(*(self.terms[measure].total(sizes) for measure in MEASURES))

    def price(self, kept: np.ndarray, of: str) -> np.ndarray:
        """What removing each kept channel alone saves, float64 [C]; 0 for those not kept."""
        savings = self.terms[of].savings(self.sizes(kept), self.share.shape[1])
        return np.where(kept, savings[self.atom_of], 0.0)

    def sizes(self, kept: np.ndarray) -> np.ndarray:
        """The size of every extent with the channels ``kept`` (bool [C]), int64 [E]."""
        counts = np.bincount(self.atom_of[kept], minlength=self.share.shape[1])
        sizes: np.ndarray = self.stays + self.share @ counts
        return sizes

    def fixed(self, gone: np.ndarray) -> CostModel:
        """The same costs when the channels ``gone`` (bool [C]) always stay."""
        counts = np.bincount(self.atom_of[gone], minlength=self.share.shape[1])
        left, atom_of = np.unique(self.atom_of[~gone], return_inverse=True)
        stays, share = self.stays + self.share @ counts, self.share[:, left]
        terms = {m: make_terms(t.scale, t.factors, share) for m, t in self.terms.items()}
        return CostModel(atom_of.astype(np.int64), stays, share, terms)

    def restrict(self, kept: np.ndarray) -> CostModel:
        """The costs of the network that has only the channels ``kept`` (bool [C]) left."""
        return replace(self, atom_of=self.atom_of[kept])


def make_terms(scale: np.ndarray, factors: np.ndarray, share: np.ndarray) -> Terms:
    """Terms with the pairs of atoms and terms filled in from ``share`` [E, A]."""
    touched = (share[factors] > 0).any(axis=1)
    term, atom = np.nonzero(touched)
    return Terms(scale, factors, atom, term, share[factors[term], atom[:, None]])


class CostBuilder:
    """Collects extents and terms over a given number of channels."""

    def __init__(self, num_channels: int) -> None:
        self._channels = num_channels
        self._known: dict[bytes, int | None] = {}
        self._stays: list[int] = []
        self._members: list[tuple[np.ndarray, np.ndarray]] = []
        self._terms: dict[str, dict[tuple[int, ...], int]] = {m: {} for m in MEASURES}

    def add(self, measure: str, scale: int, factors: Sequence[np.ndarray]) -> None:
        """One term; ``factors`` are channel id arrays, -1 for indices that stay."""
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
        """The number of the extent that counts these channels, None for a constant size."""
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
        """The model, once all terms are in. Atoms never reach over groups."""
        atom_of = refine(group_of, self._members)
        atoms = int(atom_of.max()) + 1 if len(atom_of) else 0
        share = np.zeros((len(self._members) + 1, atoms), np.int64)
        for number, (channels, counts) in enumerate(self._members):
            share[number, atom_of[channels]] = counts
        stays = np.array([*self._stays, 1], np.int64)
        one = len(self._members)
        terms = {m: _table(t, one, share) for m, t in self._terms.items()}
        return CostModel(atom_of, stays, share, terms)


def _table(terms: dict[tuple[int, ...], int], one: int, share: np.ndarray) -> Terms:
    width = max((len(key) for key in terms), default=0) or 1
    factors = np.full((len(terms), width), one, np.int64)
    for row, key in enumerate(terms):
        factors[row, : len(key)] = key
    return make_terms(np.array(list(terms.values()), np.int64), factors, share)


def refine(labels: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Split the classes ``labels`` so that members of a class agree on every part.

    A part is (members, marks): two members agree on it if both are outside, or both inside with
    equal marks. Returns int64 labels, numbered from 0 in the order of first appearance.
    """
    labels = labels.astype(np.int64, copy=True)
    for members, marks in parts:
        fresh = int(labels.max()) + 1 if len(labels) else 0
        pairs = np.stack([labels[members], marks.astype(np.int64)], axis=1)
        _, inverse = np.unique(pairs, axis=0, return_inverse=True)
        labels[members] = fresh + inverse.reshape(-1)
    return first_appearance(labels)


def first_appearance(labels: np.ndarray) -> np.ndarray:
    """The same classes, numbered from 0 in the order in which they first appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    numbered: np.ndarray = rank[inverse.reshape(-1)]
    return numbered
