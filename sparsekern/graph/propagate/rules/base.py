"""The registry of rules, and the call that a rule is given.

A rule is a function of one ``Call``: it unifies the slots of the operands and returns the value
(or the tuple of values) that the op makes. ``register_rule`` enters it for one or more ATen
names; an in-place overload (``relu_``) uses the rule of the plain name unless it has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsekern.graph.propagate.records import Factor, Records, term
from sparsekern.graph.propagate.slots import STAYS, Slots
from sparsekern.graph.propagate.values import Flags, Ids, Value, untracked

Result = Value | tuple[Value, ...]
RuleFunction = Callable[["Call"], Result]


@dataclass(frozen=True)
class Rule:
    """function: the rule; pure: scaling an operand by a positive factor scales the result by the
    same; view: the result may share memory with the first operand; norm: a scale of the operand
    is divided out."""

    function: RuleFunction
    pure: bool = False
    view: bool = False
    norm: bool = False


RULES: dict[str, Rule] = {}


def register_rule(
    *names: str, pure: bool = False, view: bool = False, norm: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Enter a rule for the ops ``names``: ``relu`` for all overloads of ``aten::relu`` and
    ``relu_``, ``max.other`` for one overload, ``mylib::op`` for an op of another library.

    Raises ValueError if a name already has a rule.
    """

    def enter(function: RuleFunction) -> RuleFunction:
        for name in names:
            if name in RULES:
                raise ValueError(f"register_rule: {name!r} already has a rule")
            RULES[name] = Rule(function, pure, view, norm)
        return function

    return enter


def dense(ids: Ids, size: int) -> np.ndarray:
    """The ids of a dimension as an array, all ``STAYS`` where nothing is tracked."""
    return np.full(size, STAYS, np.int64) if ids is None else ids


def flags(zero: Flags, size: int) -> np.ndarray:
    """The zero flags of a dimension as an array, all false where nothing is tracked."""
    return np.zeros(size, bool) if zero is None else zero


def fixed_bias(rows: Ids, weight: Value, bias: Value) -> str:
    """Why rows stay of which only the weight, or only the bias, is tracked."""
    return (weight.why if rows is None else bias.why) or "tied to a fixed bias"


@dataclass
class Call:
    """One op of the traced graph with its operands as values.

    args: the arguments by their names in the op's schema, defaults filled in; tensors as
        ``Value``, lists of tensors as lists of ``Value``.
    outputs: (shape, itemsize) of every tensor the op returns.
    module: path of the module in whose forward the op was called ("" at the top).
    settled: second round: all unions are known, and zero flags are facts, not assumptions.
    counted: the graph of evaluation mode, whose costs are counted.
    exact: whether channels stay whose removal would change what the others compute.
    reading: which of several readings of an ambiguous split to take in this module, see ``split``.
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
    reading: int
    new_storage: Callable[[], int]
    gave_up: bool = False
    froze: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} in {self.module}" if self.module else self.name

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def values(self) -> Iterator[Value]:
        """All tensor operands in schema order."""
        for argument in self.args.values():
            if isinstance(argument, Value):
                yield argument
            elif isinstance(argument, (list, tuple)):
                yield from (item for item in argument if isinstance(item, Value))

    def shape(self, index: int = 0) -> tuple[int, ...]:
        return self.outputs[index][0]

    def make(
        self,
        ids: Sequence[Ids],
        zero: Sequence[Flags],
        *,
        index: int = 0,
        origins: frozenset[int] | None = None,
        pure: frozenset[int] | None = None,
        cleared: str = "",
        why: str = "",
    ) -> Value:
        """The ``index``-th output. What is not given follows from the operands.

        ``why``: the reason why the channels that an untracked weight makes stay.
        """
        shape, itemsize = self.outputs[index]
        operands = list(self.values())
        carries = any(z is not None and z.any() for z in zero)
        if origins is None:
            origins = _joined(v.origins for v in operands) if carries else frozenset()
        # What a producer makes is new; what is frozen here stays because of this op.
        why = why or self.froze or ("" if pure else next((v.why for v in operands if v.why), ""))
        if pure is None:
            pure = _joined(v.pure for v in operands) if self.rule.pure else frozenset()
        cleared = cleared or next((v.cleared for v in operands if v.cleared), "")
        shares = self.rule.view and operands
        storage = operands[0].storage if shares else self.new_storage()
        static = bool(operands) and all(v.static for v in operands)
        made_of = _joined(v.made_of for v in operands) if static else frozenset()
        return Value(
            shape, tuple(ids), tuple(zero), itemsize, why, cleared, origins, pure, storage, static, made_of
        )

    def unify(self, left: Ids, right: Ids, size: int, reason: str) -> None:
        """Tie two dimensions of ``size`` index by index; untracked ones freeze the other."""
        if left is None and right is None:
            return
        self.slots.union(dense(left, size), dense(right, size), reason)

    def freeze(self, ids: Ids, reason: str) -> None:
        if ids is not None:
            self.froze = self.froze or reason
            self.slots.freeze(ids, reason)

    def inexact(self, ids: Ids, reason: str) -> None:
        """Kept channels change when some of ``ids`` go: they stay, unless the user allows that."""
        if self.exact:
            self.freeze(ids, reason)
        elif ids is not None and self.settled:
            self.records.inexact.append((ids, reason))

    def give_up(self, reason: str) -> Result:
        """Freeze every slot that enters; the results are untracked because of ``reason``."""
        self.gave_up = True
        for value in self.values():
            for ids in value.ids:
                self.freeze(ids, reason)
        return self.opaque(reason)

    def opaque(self, why: str) -> Result:
        """Results without tracked slots; the operands are left alone."""
        operands = list(self.values())
        static = bool(operands) and all(v.static for v in operands)
        made = tuple(
            untracked(shape, itemsize, why, self.new_storage(), static=static)
            for shape, itemsize in self.outputs
        )
        return made[0] if len(made) == 1 else made

    def require_zero(self, value: Value, dim: int) -> None:
        """Freeze the channels of ``value`` that are not zero where this op sums over them."""
        for producer in value.origins:
            self.records.producers[producer].consumed = True
        ids, zero = value.ids[dim], value.zero[dim]
        if ids is not None and zero is not None and not zero.all():
            by = f" after {value.cleared}" if value.cleared else ""
            reason = f"{self.label} reads it not as zero{by}"
            if self.exact:
                # Not through ``freeze``: what this op makes does not stay because of it.
                self.slots.freeze(ids[~zero], reason)
            else:
                self.inexact(ids[~zero], reason)

    def contract(self, value: Value, dim: int, weight: Value, weight_dim: int) -> None:
        """``value`` is summed over ``dim`` with the columns ``weight_dim`` of ``weight``."""
        size = value.shape[dim]
        reason = value.why or weight.why or f"{self.label} reads positions that stay"
        self.unify(value.ids[dim], weight.ids[weight_dim], size, reason)
        columns = weight.ids[weight_dim]
        if columns is not None:
            self.records.consume(columns)
        self.require_zero(value, dim)

    def produce(self, kind: str, rows: Ids, bias: Ids) -> frozenset[int]:
        """Note that ``rows`` (of a weight) and ``bias`` make the channels of the output."""
        if rows is None:
            return frozenset()
        number = self.records.produce(kind, self.module, rows, bias)
        return frozenset({number})

    def split(self, ids: np.ndarray, readings: int) -> int:
        """Note that ``ids`` are split in a way that has several readings; the one to take."""
        self.records.splits.append((self.module, ids, readings))
        return min(self.reading, readings - 1)

    def count_macs(self, scale: int, *factors: Factor | None) -> None:
        """Count multiply-adds: ``scale`` times the sizes (ints) or slot counts (ids)."""
        if self.counted and self.settled:
            self.records.macs.append(term(scale, [f for f in factors if f is not None]))

    def size(self, value: Value, dim: int) -> Factor:
        """The size of a dimension as a cost factor."""
        ids = value.ids[dim]
        return value.shape[dim] if ids is None else ids


def _joined(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset().union(*sets)
