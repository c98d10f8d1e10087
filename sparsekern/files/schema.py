"""Rules for plain content, such as state dicts, with errors that name the wrong entry.

A rule has a ``text``, which describes the expected value, and a method ``check(value, name)``. The method
raises ``ValueError`` for any other value: ``state['rows']['decay']: got 7, expected a number in [0, 1)``.
A rule checks a fixed depth, so checks of content that contains itself end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """A description of expected values.

    Attributes:
        text: the expected value in words, for messages.
    """

    @property
    def text(self) -> str: ...
    def check(self, value: Any, name: str) -> None:
        """Check a value.

        Args:
            name: name of the value in messages.

        Raises:
            ValueError: ``value`` is not as expected.
        """


def refuse(value: Any, name: str, expected: str) -> NoReturn:
    """Raise the error for a value that is not as expected.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name}: got {describe(value)}, expected {expected}")


def describe(value: Any) -> str:
    """A short description of any value, for messages."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout} "
        return f"a tensor {layout}{value.dtype} {list(value.shape)}"
    if isinstance(value, str | bytes):
        return repr(value[:60])
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"  # Python refuses to print very long integers
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"{type(value).__name__}{size}"


@dataclass(frozen=True)
class Whole:
    """An int in ``[low, high]``, not a bool. None is no limit."""

    low: int | None = None
    high: int | None = None

    @property
    def text(self) -> str:
        if self.high is not None:
            return f"a whole number in [{self.low}, {self.high}]"
        return "a whole number" if self.low is None else f"a whole number >= {self.low}"

    def check(self, value: Any, name: str) -> None:
        fits = type(value) is int
        fits = fits and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        if not fits:
            refuse(value, name, self.text)


@dataclass(frozen=True)
class Real:
    """A finite int or float with ``low <= value < below``, not a bool; above 0 with ``positive``."""

    low: float = -math.inf
    below: float = math.inf
    positive: bool = False

    @property
    def text(self) -> str:
        if self.positive:
            return "a finite number > 0"
        if self.below < math.inf:
            return f"a number in [{self.low:g}, {self.below:g})"
        return "a finite number" if self.low == -math.inf else f"a finite number >= {self.low:g}"

    def check(self, value: Any, name: str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison also excludes NaN, infinity, and ints that are too large for a float.
        inside = number and abs(value) <= sys.float_info.max and self.low <= value < self.below
        if not inside or (self.positive and value <= 0):
            refuse(value, name, self.text)


@dataclass(frozen=True)
class OneOf:
    """A value with the type and content of one of ``values``."""

    values: Sequence[Any]

    @property
    def text(self) -> str:
        return " or ".join(map(repr, self.values))

    def check(self, value: Any, name: str) -> None:
        if not any(type(value) is type(own) and value == own for own in self.values):
            refuse(value, name, self.text)


@dataclass(frozen=True)
class Kind:
    """A value of exactly this type, no subclass. For ``dict``, any mapping."""

    type: type

    @property
    def text(self) -> str:
        return self.type.__name__

    def check(self, value: Any, name: str) -> None:
        if type(value) is not self.type and not (self.type is dict and isinstance(value, Mapping)):
            refuse(value, name, self.text)


@dataclass(frozen=True)
class Anything:
    """Any value."""

    text: str = "anything"

    def check(self, value: Any, name: str) -> None:
        pass


@dataclass(frozen=True)
class Array:
    """A dense tensor, neither quantized nor on the meta device. Its values are read only with ``shape`` set.

    Attributes:
        shape: expected shape; None for any.
        dtype: expected dtype; None for any.
        low, high: limits of all elements. NaN passes both limits.
        nan, infinite: whether elements may be NaN or infinite.
        ndim: expected number of dimensions; None for any.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    low: float = -math.inf
    high: float = math.inf
    nan: bool = True
    infinite: bool = True
    ndim: int | None = None

    @property
    def text(self) -> str:
        kind = "a tensor" if self.dtype is None else f"{self.dtype}"
        size = f" of {self.ndim} dimensions" if self.ndim is not None else ""
        return f"{kind} {list(self.shape)}" if self.shape is not None else f"{kind}{size}"

    def check(self, value: Any, name: str) -> None:
        plain = isinstance(value, Tensor) and value.layout is torch.strided
        if not plain or value.is_quantized or value.is_meta:
            refuse(value, name, self.text)
        fits = self.dtype is None or value.dtype is self.dtype
        fits = fits and (self.shape is None or tuple(value.shape) == self.shape)
        if not fits or (self.ndim is not None and value.ndim != self.ndim):
            refuse(value, name, self.text)
        if self.shape is not None:
            self._check_values(value, name)

    def _check_values(self, value: Tensor, name: str) -> None:
        if value.is_complex():
            return
        tests: list[tuple[bool, Callable[[], Tensor], str]] = [
            (not self.nan, lambda: value.isnan(), "no NaN"),
            (not self.infinite, lambda: value.isinf(), "finite elements"),
            (self.low > -math.inf, lambda: value < self.low, f"elements >= {self.low:g}"),
            (self.high < math.inf, lambda: value > self.high, f"elements <= {self.high:g}"),
        ]
        for asked, found, expected in tests:
            if asked and bool(found().any()):
                raise ValueError(f"{name}: got {int(found().sum())} other elements, expected {expected}")


@dataclass(frozen=True)
class Fields:
    """A mapping with known entries.

    Attributes:
        required, optional: rules, keyed by the keys of the entries.
        others: rule for all other entries; None refuses other entries.
    """

    required: Mapping[Any, Rule]
    optional: Mapping[Any, Rule] = field(default_factory=dict)
    others: Rule | None = None

    @property
    def text(self) -> str:
        return f"dict with {', '.join(map(repr, list(self.required)[:4]))}"

    def check(self, value: Any, name: str) -> None:
        if not isinstance(value, Mapping):
            refuse(value, name, "dict")
        for key in self.required:
            if key not in value:
                raise ValueError(f"{name}: has no entry {key!r}, expected one")
        for key, own in value.items():
            rule = self.required.get(key) or self.optional.get(key) or self.others
            if rule is None:
                raise ValueError(f"{name}: has an entry {describe(key)}, expected none of that name")
            rule.check(own, f"{name}[{describe(key)}]")


@dataclass(frozen=True)
class Entries:
    """A mapping with any number of entries.

    Attributes:
        keys: rule for each key.
        values: rule for each value.
    """

    keys: Rule
    values: Rule

    @property
    def text(self) -> str:
        return "dict"

    def check(self, value: Any, name: str) -> None:
        if not isinstance(value, Mapping):
            refuse(value, name, self.text)
        for key, own in value.items():
            self.keys.check(key, f"a key of {name}")
            self.values.check(own, f"{name}[{describe(key)}]")


@dataclass(frozen=True)
class Items:
    """A list or tuple whose items all follow one rule.

    Attributes:
        rule: rule for each item.
        length: number of items; None for any number of at least ``least``.
        least: minimum number of items.
    """

    rule: Rule
    length: int | None = None
    least: int = 0

    @property
    def text(self) -> str:
        if self.length is not None:
            return f"a list of {self.length}"
        return f"a list of at least {self.least}" if self.least else "a list"

    def check(self, value: Any, name: str) -> None:
        if not isinstance(value, list | tuple) or len(value) < self.least:
            refuse(value, name, self.text)
        if self.length is not None and len(value) != self.length:
            refuse(value, name, self.text)
        for index, own in enumerate(value):
            self.rule.check(own, f"{name}[{index}]")


@dataclass(frozen=True)
class Row:
    """A list or tuple with one rule per item."""

    rules: Sequence[Rule]

    @property
    def text(self) -> str:
        return f"a list of {len(self.rules)}"

    def check(self, value: Any, name: str) -> None:
        if not isinstance(value, list | tuple) or len(value) != len(self.rules):
            refuse(value, name, self.text)
        for index, (rule, own) in enumerate(zip(self.rules, value, strict=True)):
            rule.check(own, f"{name}[{index}]")


@dataclass(frozen=True)
class Either:
    """A value that at least one of the rules accepts."""

    rules: Sequence[Rule]

    @property
    def text(self) -> str:
        return " or ".join(rule.text for rule in self.rules)

    def check(self, value: Any, name: str) -> None:
        for rule in self.rules:
            try:
                rule.check(value, name)
            except ValueError:
                continue
            return
        refuse(value, name, self.text)


@dataclass(frozen=True)
class Accepted:
    """A value that a function accepts. This rule is for values that a library checks itself.

    Attributes:
        use: called with the value; any exception means that the value is not accepted.
        text: the expected value in words, for messages.
    """

    use: Callable[[Any], object]
    text: str

    def check(self, value: Any, name: str) -> None:
        try:
            self.use(value)
        except Exception as error:
            raise ValueError(f"{name}: got a value that is no {self.text} ({error}), expected one") from None


NOTHING = OneOf((None,))
FLAG = Kind(bool)
TEXT = Kind(str)
_LEAF: tuple[Rule, ...] = (Real(), FLAG, TEXT, NOTHING, Array(shape=()))
PLAIN = Either((*_LEAF, Items(Either(_LEAF))))
"""A number, flag, text, None or a list of these, as in the groups of optimizers and schedulers."""


def like(value: Any) -> Rule:
    """A rule for values of the same kind as ``value``, with any content.

    Numbers of all types are one kind. Tensors with several elements have to have the same shape.
    """
    if isinstance(value, bool):
        return Either((FLAG, NOTHING))
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return Either((Real(), Array(shape=()), Array(shape=(1,))))
    if isinstance(value, str):
        return TEXT
    if isinstance(value, Tensor):
        return Array(shape=tuple(value.shape))
    if isinstance(value, list | tuple):
        return Row([like(own) for own in value])
    return Kind(dict) if isinstance(value, Mapping) else PLAIN


def shorten(names: Iterable[str], most: int = 5) -> str:
    """The first ``most`` names as text, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
