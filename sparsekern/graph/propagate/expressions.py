"""The constants of masked channels as expressions of the network's parameters.

An expression is a number that ops compute from zero, from numbers and from tensors with one element. Training
changes such parameters, so an expression is evaluated when its channel is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.graph.propagate.values import Value

UNKNOWN = -1
ZERO = 0
"""The number of the expression of a zero."""


class Reference(NamedTuple):
    """A parameter or buffer with one element.

    Attributes:
        tensor: its number; in a channel graph its name.
    """

    tensor: int | str


class Applied(NamedTuple):
    """An op and its arguments.

    Attributes:
        op: name and overload, such as ``aten::add.Tensor``.
        arguments: pairs of a name in the op's schema and a number, an expression, or a tuple of them.
    """

    op: str
    arguments: tuple[tuple[str, Any], ...]


class Zero(NamedTuple):
    """A slice of zeros."""


Expression = Zero | Applied | Reference


class Expressions:
    """All expressions of a trace, each with a number."""

    def __init__(self) -> None:
        self.known: list[Expression] = [Zero()]
        self._numbers: dict[Expression, int] = {Zero(): ZERO}

    def number(self, expression: Expression) -> int:
        """The number of an expression; equal ones have the same."""
        number = self._numbers.setdefault(expression, len(self.known))
        if number == len(self.known):
            self.known.append(expression)
        return number

    def apply(self, op: str, arguments: Mapping[str, Any], moving: Sequence[tuple[Value, int]]) -> int:
        """The number of what an op makes.

        Args:
            op: name and overload of the op.
            arguments: its arguments by name.
            moving: the operands that hold channels, each with the number of its expression.

        Returns:
            A number; ``UNKNOWN`` if an argument is neither a number nor a tensor with one element.
        """
        numbers = {id(value): number for value, number in moving}

        def plain(argument: Any) -> Any:
            if isinstance(argument, Value):
                if id(argument) in numbers:
                    return self.known[numbers[id(argument)]]
                source = argument.affine
                single = argument.static and all(size == 1 for size in argument.shape)
                if not single or source is None or (source.factor, source.offset) != (1.0, 0.0):
                    raise LookupError
                return Reference(source.tensor)
            return tuple(map(plain, argument)) if isinstance(argument, (list, tuple)) else argument

        if UNKNOWN in numbers.values():
            return UNKNOWN
        try:
            made = Applied(op, tuple((name, plain(argument)) for name, argument in arguments.items()))
            return self.number(made)
        except (LookupError, TypeError):  # a tensor with more elements, or an argument that has no hash
            return UNKNOWN


def named(expression: Any, name_of: Callable[[Any], str]) -> Any:
    """An expression with other names of its tensors.

    Args:
        expression: the expression, or an argument in one.
        name_of: gives the new name of a tensor by what its references hold: its number, or its name.

    Returns:
        The same with the new names.
    """
    if isinstance(expression, Reference):
        return Reference(name_of(expression.tensor))
    if isinstance(expression, Applied):
        return Applied(expression.op, tuple((name, named(a, name_of)) for name, a in expression.arguments))
    return tuple(named(a, name_of) for a in expression) if type(expression) is tuple else expression


def evaluate(expression: Any, tensor: Callable[[str], Tensor], like: Tensor) -> Any:
    """The present value of an expression.

    Args:
        expression: the expression with names of tensors, or an argument in one.
        tensor: gives a parameter or buffer by name.
        like: a tensor of the dtype and device to compute in.

    Returns:
        A tensor with one element.
    """
    if isinstance(expression, Zero):
        return like.new_zeros(1, 1)
    if isinstance(expression, Reference):
        return tensor(str(expression.tensor)).detach().to(like)
    if isinstance(expression, Applied):
        name, _, overload = expression.op.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, name), overload or "default")
        return op(**{name: evaluate(a, tensor, like) for name, a in expression.arguments})
    if type(expression) is tuple:
        return [evaluate(a, tensor, like) for a in expression]
    return expression
