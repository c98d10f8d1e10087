"""The registry of rules, and the call that a rule takes.

A rule is a function of one ``Call``. It unifies the slots of the operands and returns the value, or
the tuple of values, that the op makes. ``register_rule`` enters a rule for one or more ATen names. An
in-place overload (``relu_``) uses the rule of the plain name unless it has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from sparsekern.graph.propagate.constants import mask_columns
from sparsekern.graph.propagate.records import Cut, Factor, Records, Split, term
from sparsekern.graph.propagate.slots import STAYS, Slots
from sparsekern.graph.propagate.values import Affine, Average, Flags, Ids, Value, untracked

Result = Value | tuple[Value, ...]
RuleFunction = Callable[["Call"], Result]


@dataclass(frozen=True)
class Rule:
    """A rule and the properties of its ops.

    Attributes:
        function: the rule.
        pure: whether scaling an operand by a positive factor scales the result by the same factor.
        view: whether the result may share memory with the first operand.
        norm: whether the op divides out the scale of its operand.
        averages: whether the rule follows operands that depend on the number of channels of a mean (see
            ``Average``). Any other rule that is not ``pure`` freezes these channels.
    """

    function: RuleFunction
    pure: bool = False
    view: bool = False
    norm: bool = False
    averages: bool = False


RULES: dict[str, Rule] = {}


def register_rule(
    *names: str, pure: bool = False, view: bool = False, norm: bool = False, averages: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Enter a rule for ops.

    Args:
        names: names of ops: ``relu`` for all overloads of ``aten::relu`` and ``relu_``, ``max.other``
            for one overload, ``mylib::op`` for an op of another library.
        pure: whether scaling an operand by a positive factor scales the result by the same factor.
        view: whether the result may share memory with the first operand.
        norm: whether the op divides out the scale of its operand.
        averages: whether the rule follows means over channels; see ``Rule``.

    Returns:
        A decorator for the rule, a function of one ``Call``. It raises ValueError if a name already
        has a rule.
    """

    def enter(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in RULES:
                raise ValueError(f"name: got {name!r}, which already has a rule, expected another op")
            RULES[name] = Rule(function, pure, view, norm, averages)
        return function

    return enter


def dense(ids: Ids, size: int) -> np.ndarray:
    """The ids of a dimension of ``size`` indices, int64 [size]; all ``STAYS`` if ``ids`` is None."""
    return np.full(size, STAYS, np.int64) if ids is None else ids


def flags(zero: Flags, size: int) -> np.ndarray:
    """The zero flags of a dimension of ``size`` indices, bool [size]; all false if ``zero`` is None."""
    return np.zeros(size, bool) if zero is None else zero


@dataclass
class Call:
    """One op of the traced graph with its operands as values.

    Attributes:
        name: name of the op without ``aten::``.
        overload: name of its overload.
        module: path of the module in whose forward the op is called ("" at the top).
        args: arguments by their names in the op's schema, with defaults filled in. Tensors are
            ``Value``, lists of tensors are lists of ``Value``.
        outputs: (shape, bytes per element) of every tensor that the op returns.
        slots: all slots.
        records: the records to fill.
        rule: the rule of the op.
        settled: whether this is the second pass, in which all unions are known and zero flags are
            facts, not assumptions.
        counted: whether the graph is that of evaluation mode, whose costs are counted.
        exact: whether channels stay if their removal changes what the others compute.
        follows: whether a number by which a sum over as many channels is divided is taken to count them.
        interpretation: the choices to take for the ambiguous splits of this module; see ``split``.
        splits: the number of ambiguous splits of this module that came before in this graph.
        new_storage: makes a new storage number.
        node: the node of the op in the traced graph.
        gave_up: whether the op is not followed; set by ``give_up``.
        froze: the first reason for which the op froze slots; empty if it froze none.
        made_up: numbers of the tensors that make up for a mean over channels in this op.
    """

    name: str
    overload: str
    module: str
    args: dict[str, Any]
    outputs: list[tuple[tuple[int, ...], int]]
    slots: Slots
    records: Records
    rule: Rule
    settled: bool
    counted: bool
    exact: bool
    follows: bool
    interpretation: tuple[int, ...]
    splits: int
    new_storage: Callable[[], int]
    node: fx.Node
    gave_up: bool = False
    froze: str = ""
    made_up: set[int] = field(default_factory=set)

    @property
    def label(self) -> str:
        """The op and its module, for messages."""
        return f"{self.name} in {self.module}" if self.module else self.name

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def values(self) -> Iterator[Value]:
        """Iterate over the tensor operands.

        Yields:
            Values in the order of the schema, including those in lists.
        """
        for argument in self.args.values():
            if isinstance(argument, Value):
                yield argument
            elif isinstance(argument, (list, tuple)):
                yield from (item for item in argument if isinstance(item, Value))

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of the output ``index``."""
        return self.outputs[index][0]

    def make(
        self,
        ids: Sequence[Ids],
        zero: Sequence[Flags],
        *,
        index: int = 0,
        origins: frozenset[int] | None = None,
        pure: frozenset[int] | None = None,
        zero_broken_by: str = "",
        untracked_reason: str = "",
        affine: Affine | None = None,
        average: Average | None = None,
    ) -> Value:
        """Make an output. Arguments that are not given follow from the operands.

        Args:
            ids: slot ids of the output's dimensions; see ``Value``.
            zero: zero flags of the output's dimensions; see ``Value``.
            index: the number of the output.
            origins: producers whose zeros the output carries.
            pure: producers whose positive rescaling rescales the output.
            zero_broken_by: the op that broke zeros, for messages.
            untracked_reason: why the channels stay that an untracked weight makes.
            affine: the tensor that the output is an affine function of.
            average: the factor by which the output depends on the number of channels.

        Returns:
            The output.
        """
        shape, itemsize = self.outputs[index]
        operands = list(self.values())
        carries = any(z is not None and z.any() for z in zero)
        if origins is None:
            origins = _joined(v.origins for v in operands) if carries else frozenset()
        # A producer makes new channels, so the operands' reasons do not apply. Indices that this op
        # froze stay because of it.
        untracked_reason = (
            untracked_reason
            or self.froze
            or ("" if pure else next((v.untracked_reason for v in operands if v.untracked_reason), ""))
        )
        if pure is None:
            pure = _joined(v.pure for v in operands) if self.rule.pure else frozenset()
        zero_broken_by = zero_broken_by or next((v.zero_broken_by for v in operands if v.zero_broken_by), "")
        shares = self.rule.view and operands
        storage = operands[0].storage if shares else self.new_storage()
        static = bool(operands) and all(v.static for v in operands)
        made_of = _joined(v.made_of for v in operands) if static else frozenset()
        if affine is None and static and self.rule.view and "dropout" not in self.name:
            affine = operands[0].affine
        return Value(
            shape,
            tuple(ids),
            tuple(zero),
            itemsize,
            untracked_reason,
            zero_broken_by,
            origins,
            pure,
            storage,
            static,
            bool(self.rule.view and operands and operands[0].picked),
            made_of,
            affine,
            average,
        )

    def unify(self, left: Ids, right: Ids, size: int, reason: str) -> None:
        """Tie two dimensions index by index. An untracked dimension freezes the other.

        Args:
            left: slot ids of a dimension, or None.
            right: slot ids of a dimension, or None.
            size: the size of both dimensions.
            reason: why an index that is paired with one that stays is frozen.
        """
        if left is None and right is None:
            return
        self.slots.union(dense(left, size), dense(right, size), reason)

    def named(self, sizes: Sequence[int], index: int = 0) -> list[Ids]:
        """Slots of dimensions whose sizes the program names; None for a size of 1.

        Args:
            sizes: the sizes, 1 for a dimension that is not named.
            index: the number of the output.

        Returns:
            Slot ids of the dimensions.
        """
        keys = ((self.node, index, dim) for dim in range(len(sizes)))
        return [
            self.slots.named(key, size) if size > 1 else None for key, size in zip(keys, sizes, strict=True)
        ]

    def freeze(self, ids: Ids, reason: str) -> None:
        """Freeze the slots ``ids`` for ``reason``; None is ignored."""
        if ids is not None and len(ids):
            self.froze = self.froze or reason
            self.slots.freeze(ids, reason)

    def inexact(self, ids: Ids, reason: str) -> None:
        """Freeze or, with ``exact=False``, record slots ``ids`` whose removal changes kept channels."""
        if self.exact:
            self.freeze(ids, reason)
        elif ids is not None and self.settled:
            self.records.inexact.append((ids, reason))

    def lose(self, *averages: Average | None) -> None:
        """Freeze or, with ``exact=False``, record the channels of means that nothing makes up for."""
        for average in averages:
            if average is not None:
                self.inexact(average.ids, average.reason)

    def give_up(self, reason: str) -> Result:
        """Freeze every slot of the operands and return results that are untracked for ``reason``."""
        self.gave_up = True
        for value in self.values():
            for ids in value.ids:
                self.freeze(ids, reason)
        return self.opaque(reason)

    def opaque(self, untracked_reason: str) -> Result:
        """Make outputs without tracked slots. The operands do not change.

        Args:
            untracked_reason: why the indices of the outputs stay.

        Returns:
            The output, or a tuple of several.
        """
        operands = list(self.values())
        static = bool(operands) and all(v.static for v in operands)
        made = tuple(
            untracked(shape, itemsize, untracked_reason, self.new_storage(), static=static)
            for shape, itemsize in self.outputs
        )
        return made[0] if len(made) == 1 else made

    def require_zero(self, value: Value, dim: int, weight: Value | None = None, columns: Ids = None) -> None:
        """Require zeros in the channels that this op sums over, or in the columns that read them.

        Other channels that are not zero are frozen or, with ``exact=False``, recorded as inexact.

        Args:
            value: an operand.
            dim: the dimension that the op sums over.
            weight: the weight that the channels are multiplied by; None if there is none.
            columns: raw slot ids of its columns, one for each channel.
        """
        for producer in value.origins:
            self.records.producers[producer].consumed = True
        ids, zero = value.ids[dim], value.zero[dim]
        if weight is not None and columns is not None:
            zero = mask_columns(self.records, value, dim, weight, columns, self.node, settled=self.settled)
        if not self.settled or ids is None or zero is None or zero.all():
            # Which channels are zero or constant shows in the second pass.
            return
        by = f" after {value.zero_broken_by}" if value.zero_broken_by else ""
        reason = f"{self.label} reads it not as zero{by}"
        if self.exact:
            # ``Call.freeze`` would also give this reason to the outputs of the op.
            self.slots.freeze(ids[~zero], reason)
        else:
            self.inexact(ids[~zero], reason)

    def contract(self, value: Value, dim: int, weight: Value, weight_dim: int) -> None:
        """Record a sum over a dimension of a value and the columns of a weight.

        Args:
            value: the activations.
            dim: the dimension of ``value``.
            weight: the weight.
            weight_dim: the dimension of ``weight`` that holds its columns.
        """
        size = value.shape[dim]
        reason = (
            value.untracked_reason or weight.untracked_reason or f"{self.label} reads positions that stay"
        )
        self.unify(value.ids[dim], weight.ids[weight_dim], size, reason)
        columns = weight.ids[weight_dim]
        if columns is not None:
            self.records.consume(columns)
        self.require_zero(value, dim, weight, columns)

    def produce(self, kind: str, rows: Ids, bias: Ids) -> frozenset[int]:
        """Record a producer: a weight and a bias whose rows make the channels of the output.

        Args:
            kind: see ``Producer``.
            rows: slot ids of the weight's rows.
            bias: slot ids of the bias.

        Returns:
            The producer's number in a set; an empty set if ``rows`` is None.
        """
        if rows is None:
            return frozenset()
        number = self.records.produce(kind, self.module, rows, bias)
        return frozenset({number})

    def split(self, ids: np.ndarray, axes: tuple[int, ...]) -> int:
        """Record a split that has several interpretations.

        Args:
            ids: slot ids of the dimension that is split.
            axes: the axes that may carry the channels; see ``Split``.

        Returns:
            The axis to take, counted from the end.
        """
        number = self.splits
        self.splits += 1
        self.records.splits.append(Split(self.module, number, ids, axes))
        choice = self.interpretation[number] if number < len(self.interpretation) else 0
        return axes[choice] if choice < len(axes) else axes[0]

    def cut(self, ids: Ids) -> None:
        """Record in the second pass that a number in the program counts the indices ``ids``."""
        if ids is not None and len(ids) and self.settled:
            self.records.cuts.append(Cut(self.module, len(ids), ids))

    def count_macs(self, scale: int, *factors: Factor | None) -> None:
        """Count multiply-adds in the second pass over evaluation mode.

        Args:
            scale: the constant factor.
            factors: sizes, or slot ids of dimensions whose sizes are multiplied; None is ignored.
        """
        if self.counted and self.settled:
            self.records.macs.append(term(scale, [f for f in factors if f is not None], self.module))

    def size(self, value: Value, dim: int) -> Factor:
        """The size of a dimension as a cost factor: its slot ids if tracked, else a number."""
        ids = value.ids[dim]
        return value.shape[dim] if ids is None else ids


def _joined(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)
