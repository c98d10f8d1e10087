"""The records that rules make besides unions of slots while a network is interpreted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import fx

from sparsekern.graph.propagate.expressions import Expressions
from sparsekern.graph.propagate.operations import Read
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.propagate.values import Affine, Average, Ids

Factor = np.ndarray | int


@dataclass
class Producer:
    """A weight, or the affine of a normalisation, whose rows make channels.

    Attributes:
        kind: "dense", "depthwise", "embedding" or "norm".
        module: path of the module in whose forward the op is called.
        rows: raw slot ids of the weight's tracked rows, int64.
        bias: raw slot ids of the bias, int64.
        norms: numbers of the producers that are normalisations of this output. The output may be
            rescaled in between.
        mixed: whether an op other than a normalisation reads the output, so that the producer's own
            rows set the scale.
        consumed: whether the producer's zeros reach a consumer. False for the gate of a
            squeeze-and-excitation block.
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
    """A part of a cost: ``scale`` times the product of the sizes of ``factors``.

    Attributes:
        scale: the constant factor.
        factors: raw slot ids of the dimensions whose sizes are multiplied, int64.
        module: path of the module in whose forward the op is called.
    """

    scale: int
    factors: list[np.ndarray]
    module: str = ""


class Split(NamedTuple):
    """A split of a dimension that has several interpretations.

    Attributes:
        module: path of the module in whose forward it is called.
        number: its number among the splits of the module in one graph.
        ids: slot ids of the dimension, int64.
        axes: the axes that may carry the channels, counted from the end; the first choice comes first.
            The others are in the same order for every split.
    """

    module: str
    number: int
    ids: np.ndarray
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Shaped:
    """A reshape to sizes that the program names.

    Attributes:
        module: path of the module in whose forward it is called.
        before: shape of the operand.
        after: shape of the result.
        ids: slot ids of the result's dimensions.
    """

    module: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    ids: tuple[Ids, ...]


@dataclass(frozen=True, eq=False)
class Epsilon:
    """A constant that is added to a mean over channels, or bounds it, and has to grow with it.

    Attributes:
        node: the op that reads it.
        module: path of the module in whose forward the op is called.
        number: its value.
        default: whether the op takes it by default (``eps=None``).
        shape: shape of the mean; of the input for a normalisation.
        average: the factor of the mean.
    """

    node: fx.Node
    module: str
    number: float
    default: bool
    shape: tuple[int, ...]
    average: Average


@dataclass(frozen=True, eq=False)
class Absorbed:
    """A tensor that multiplies a value which depends on the number of channels, and makes up for it.

    Attributes:
        weight: the tensor, and how the op reads it.
        average: the factor of the value.
        label: the op, for messages.
    """

    weight: Affine
    average: Average
    label: str


@dataclass(frozen=True, eq=False)
class Cut:
    """A position at which the program cuts a dimension by number.

    Attributes:
        module: path of the module in whose forward it is called.
        number: the position, or the size of a part.
        ids: slot ids of the indices that the number counts, int64 ``[number]``.
    """

    module: str
    number: int
    ids: np.ndarray


class Records:
    """Producers, consumers, row dimensions and cost terms, collected over both modes.

    Args:
        slots: all slots.

    Attributes:
        producers: producers in the order in which they run.
        row_marks: distinct (tensor number, dimension) pairs along which layers make channels.
        consumers: distinct (tensor number, dimension) pairs that layers contract over.
        families: sets of tensor numbers that a weight is computed from, such as two low-rank factors.
        read: numbers of the parameters and buffers that an op reads.
        macs: terms of the multiply-adds.
        activations: terms of the bytes of activations.
        operations: the ops of evaluation mode, in order.
        splits: ambiguous splits.
        shaped: reshapes to sizes that the program names, which a module may keep as an attribute.
        cuts: positions at which the program cuts dimensions by number.
        inexact: (slot ids, reason) of channels whose removal changes others; empty if those are frozen.
        values: the value of every node of the traced graphs, or lists and tuples of values.
        epsilons: constants that grow with a mean over channels.
        divisors: raw slot ids of channels whose number divides a sum over them.
        absorbed: tensors that make up for the number of channels of a mean.
        otherwise: by number of a tensor, an op that reads it in another way than to make up for a mean.
        parameters: numbers of the tensors that are parameters.
        masked_columns: raw slot ids of the columns that read constant channels, in arrays of int64.
        expressions: the constants as expressions of parameters.
        constant_reads: (layer, numbers of expressions) of the layers that read constants, one for a column.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._keys: dict[bytes, int] = {}
        self.producers: list[Producer] = []
        self.row_marks: dict[tuple[int, int], None] = {}
        self.consumers: dict[tuple[int, int], None] = {}
        self.families: set[frozenset[int]] = set()
        self.read: set[int] = set()
        self.macs: list[Term] = []
        self.activations: list[Term] = []
        self.operations: list[Read] = []
        self.splits: list[Split] = []
        self.shaped: list[Shaped] = []
        self.cuts: list[Cut] = []
        self.inexact: list[tuple[np.ndarray, str]] = []
        self.values: dict[fx.Node, Any] = {}
        self.epsilons: list[Epsilon] = []
        self.divisors: list[np.ndarray] = []
        self.absorbed: list[Absorbed] = []
        self.otherwise: dict[int, str] = {}
        self.parameters: frozenset[int] = frozenset()
        self.masked_columns: list[np.ndarray] = []
        self.expressions = Expressions()
        self.constant_reads: list[tuple[fx.Node, np.ndarray]] = []

    def produce(self, kind: str, module: str, rows: np.ndarray, bias: np.ndarray | None) -> int:
        """Record a producer. A tied weight that is used again is the same producer.

        Args:
            kind: see ``Producer``.
            module: path of the module in whose forward the op is called.
            rows: slot ids of the weight's rows, int64, -1 where one stays.
            bias: slot ids of the bias; None if there is none.

        Returns:
            The producer's number.
        """
        bias = np.empty(0, np.int64) if bias is None else bias[bias >= 0]
        rows = rows[rows >= 0]
        rows, bias = (ids[self._slots.registered(ids)] for ids in (rows, bias))
        key = kind.encode() + rows.tobytes() + b"|" + bias.tobytes()
        number = self._keys.setdefault(key, len(self.producers))
        if number == len(self.producers):
            self.producers.append(Producer(kind, module, rows, bias))
        for ids in (rows, bias):
            for owner in self._slots.owners(ids):
                self.row_marks[owner] = None
        return number

    def consume(self, columns: np.ndarray) -> None:
        """Record that a layer contracts over the dimension of the raw ids ``columns``."""
        for owner in self._slots.owners(columns):
            self.consumers[owner] = None


def term(scale: int, factors: list[Factor], module: str) -> Term:
    """Make a cost term.

    Args:
        scale: the constant factor.
        factors: slot ids of dimensions, or plain sizes, which are multiplied into the scale.
        module: path of the module in whose forward the op is called.

    Returns:
        The term.
    """
    tracked = []
    for factor in factors:
        if isinstance(factor, np.ndarray):
            tracked.append(factor)
        else:
            scale *= int(factor)
    return Term(scale, tracked, module)
