"""What the rules note down while a network is interpreted, besides the unions themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from sparsekern.graph.propagate.operations import Read
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.propagate.values import Ids

Factor = np.ndarray | int


@dataclass
class Producer:
    """A weight, or the affine of a normalisation, whose rows make channels.

    rows: raw slot ids of the weight's rows, as far as tracked; bias: those of the bias.
    norms: numbers of the normalisations that read nothing but a rescaling of this output.
    mixed: something that is not a normalisation reads the output, so its own rows set the scale.
    consumed: its zeros reach a consumer (false for the gate of a squeeze-and-excitation block).
    """

    kind: str
    module: str
    rows: np.ndarray
    bias: np.ndarray
    norms: list[int] = field(default_factory=list)
    mixed: bool = False
    consumed: bool = False


@dataclass
class Term:
    """``scale`` times the product of the sizes of ``factors``: part of a cost."""

    scale: int
    factors: list[np.ndarray]


@dataclass(frozen=True)
class Shaped:
    """A reshape in ``module`` from ``before`` to ``after`` with the ids of its result."""

    module: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    ids: tuple[Ids, ...]


class Records:
    """Producers, consumers, row dimensions and cost terms, collected over both modes."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._keys: dict[bytes, int] = {}
        self.producers: list[Producer] = []
        self.row_marks: dict[tuple[int, int], None] = {}
        self.consumers: dict[tuple[int, int], None] = {}
        # Tensors (by number) that a weight is computed from, such as a matrix and two of low rank.
        self.families: set[frozenset[int]] = set()
        # Numbers of the parameters and buffers that an op reads.
        self.read: set[int] = set()
        self.macs: list[Term] = []
        self.activations: list[Term] = []
        self.operations: list[Read] = []
        # Splits with several readings: module, slots, how many readings there are.
        self.splits: list[tuple[str, np.ndarray, int]] = []
        # Reshapes to sizes that the program names: a module may keep such a size as an attribute.
        self.shaped: list[Shaped] = []
        # Channels that change others when they go, and why; empty where those are frozen.
        self.inexact: list[tuple[np.ndarray, str]] = []
        # What every node of the traced graphs makes: values, or lists and tuples of them.
        self.values: dict[fx.Node, Any] = {}

    def produce(self, kind: str, module: str, rows: np.ndarray, bias: np.ndarray | None) -> int:
        """The number of the producer with these rows; a tied weight is one producer."""
        bias = np.empty(0, np.int64) if bias is None else bias[bias >= 0]
        rows = rows[rows >= 0]
        key = kind.encode() + rows.tobytes() + b"|" + bias.tobytes()
        number = self._keys.setdefault(key, len(self.producers))
        if number == len(self.producers):
            self.producers.append(Producer(kind, module, rows, bias))
        for ids in (rows, bias):
            for owner in self._slots.owners(ids):
                self.row_marks[owner] = None
        return number

    def consume(self, columns: np.ndarray) -> None:
        """Note that a weight is contracted over the dimension these raw ids belong to."""
        for owner in self._slots.owners(columns):
            self.consumers[owner] = None


def term(scale: int, factors: list[Factor]) -> Term:
    """A cost term; plain sizes go into its scale."""
    tracked = []
    for factor in factors:
        if isinstance(factor, np.ndarray):
            tracked.append(factor)
        else:
            scale *= int(factor)
    return Term(scale, tracked)
