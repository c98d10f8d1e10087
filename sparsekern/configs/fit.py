"""Finding the configuration that makes a model of given sizes.

Every size that the configuration at hand gets wrong is an equation for the fields that it changes with. An
equation with one open field gives its value; all equations of a field have to agree. The field then has its
value, and equations of several fields lose it, until every size is right or equations contradict each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sparsekern.configs.depth import with_depth
from sparsekern.configs.fields import (
    Influence,
    Place,
    Skeleton,
    changed,
    fields_of,
    influence,
    value_of,
)

# Fields that a configuration may leave open, with the attributes of modules that have their values. Families
# without a field for the size of a head read it all the same, where it is set.
_OPEN = {"head_dim": ("head_dim",), "n_inner": ("nf", "out_features")}
_READ_UNDECLARED = ("head_dim",)
HEAD_SIZES = ("head_dim", "d_kv", "head_size")
"""Fields for the size of a head, which stays: channels of a head go with the whole head."""

# Sizes that stay where nothing else tells a field from another.
_FIRST_TO_STAY = (*HEAD_SIZES, "hidden_size", "d_model", "n_embd")


class Unsayable(ValueError):
    """A configuration cannot say the sizes of a model.

    Attributes:
        wishes: the values that tensors ask of a field; or sizes, if no field changes them.
        text: the values and their tensors, without the name of an argument.
    """

    def __init__(
        self, field: str, wishes: Mapping[Place, float], family: str, value: float | None = None
    ) -> None:
        self.wishes, self._value = dict(wishes), value
        self.text = f"got sizes that no {family} makes: {_described(field, self.wishes)}"
        super().__init__(f"model: {self.text}")

    def sides(self) -> tuple[list[Place], list[Place]]:
        """The sizes that fit the configuration as it is, and those that do not.

        Where none fits, the first list has those that ask for the most frequent value.
        """
        if self._value not in self.wishes.values():
            self._value = _by_value(self.wishes)[0][0]
        return (
            [place for place, wish in self.wishes.items() if wish == self._value],
            [place for place, wish in self.wishes.items() if wish != self._value],
        )


def _by_value(wishes: Mapping[Place, float]) -> list[tuple[float, list[Place]]]:
    found: dict[float, list[Place]] = defaultdict(list)
    for place, value in wishes.items():
        found[value].append(place)
    return sorted(found.items(), key=lambda entry: -len(entry[1]))


def _described(field: str, wishes: Mapping[Place, float]) -> str:
    parts = []
    for value, places in _by_value(wishes):
        names = list(dict.fromkeys(name for name, _ in places))
        rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
        parts.append(f"{value:g} by {', '.join(names[:2])}{rest}")
    return f"{field or 'a size that no field sets'} is {'; '.join(parts)}"


def fitted(kind: type[nn.Module], config: Any, model: nn.Module) -> Any:
    """The configuration that makes a model of the sizes of ``model``.

    Args:
        kind: the class of the model.
        config: a configuration that made it before it was cut.
        model: the model.

    Returns:
        A changed copy of ``config``. Numbers of layers, sizes of tensors, and numbers such as epsilons that
        modules keep follow the model.

    Raises:
        Unsayable: no configuration does.
        ValueError: ``config`` makes no model of this class.
    """
    want = Skeleton.of(model)
    config = with_depth(kind, config, want)
    made = Skeleton.made(kind, config)
    if made.differing(want):
        config = opened(kind, config, want)
        config = changed(config, Fit(kind, config).numbers(want))
    if missing := Skeleton.made(kind, config).differing(want):
        raise Unsayable("", {p: float(size) for p, (_, size) in missing.items()}, type(config).__name__)
    return _with_numbers(kind, config, model)


def opened(kind: type[nn.Module], config: Any, want: Skeleton) -> Any:
    """The configuration with fields that it left open, if the family reads them.

    Args:
        kind: the class of the model.
        config: its configuration.
        want: the skeleton of the model.

    Returns:
        A copy in which these fields have values that change no size, or bring the sizes nearer to ``want``.
    """
    for owner in ("", *(f"{name}." for name in _nested(config))):
        for name, attributes in _OPEN.items():
            field, made = f"{owner}{name}", Skeleton.made(kind, config)
            declared = name in _READ_UNDECLARED or hasattr(value_of(config, owner[:-1]), name)
            if value_of(config, field) is not None or not declared:
                continue
            values = (*_numbers(want.module, attributes), *_numbers(made.module, attributes))
            for value in dict.fromkeys(values):
                try:
                    trial = changed(config, {field: value})
                    other = Skeleton.made(kind, trial)
                    read = influence(kind, trial, other, field).slopes
                except ValueError:
                    continue
                if read and len(other.differing(want)) <= len(made.differing(want)):
                    config = trial
                    break
    return config


def _nested(config: Any) -> list[str]:
    """The names of the configurations inside a configuration."""
    return list(dict.fromkeys(f.rpartition(".")[0] for f in fields_of(config, int) if "." in f))


def _numbers(module: nn.Module, attributes: tuple[str, ...]) -> Iterator[int]:
    for part in module.modules():
        for attribute in attributes:
            value = vars(part).get(attribute)
            if type(value) is int and value > 0:
                yield value


class Fit:
    """Finds the numbers with which a configuration makes given sizes; remembers what it has tried.

    Args:
        kind: the class of the models.
        config: the configuration to change.
    """

    def __init__(self, kind: type[nn.Module], config: Any) -> None:
        self._kind, self._config = kind, config
        self._made: dict[str, Skeleton] = {}
        self._probed: dict[tuple[str, str], Influence] = {}

    def numbers(self, want: Skeleton) -> dict[str, int]:
        """The fields to change, with their values, for a model with all sizes of ``want``.

        Tensors that ``want`` lacks may have any size.

        Raises:
            Unsayable: no values give these sizes.
        """
        family, values = type(self._config).__name__, dict[str, int]()
        fields = [field for field in fields_of(self._config, int) if value_of(self._config, field) >= 1]
        while wrong := _apart(made := self._skeleton(values), want):
            found = {field: self._influence(values, field) for field in fields}
            fields = [field for field in fields if found[field].slopes.keys() & want.places()]
            new = _settled(fields, found, made, want, family)
            if new is None:
                raise Unsayable("", {place: float(size) for place, (_, size) in wrong.items()}, family)
            field, value = new
            fields.remove(field)
            if value != found[field].value:
                values = {**values, field: value}
        return values

    def _skeleton(self, values: dict[str, int]) -> Skeleton:
        key = repr(sorted(values.items()))
        if key not in self._made:
            self._made[key] = Skeleton.made(self._kind, changed(self._config, values))
        return self._made[key]

    def _influence(self, values: dict[str, int], field: str) -> Influence:
        key = repr(sorted(values.items())), field
        if key not in self._probed:
            made, config = self._skeleton(values), changed(self._config, values)
            self._probed[key] = influence(self._kind, config, made, field)
        return self._probed[key]


def _apart(made: Skeleton, want: Skeleton) -> dict[Place, tuple[int, int]]:
    """The sizes of ``want`` that ``made`` has not, with both; -1 for a tensor that ``made`` lacks."""
    return {place: sizes for place, sizes in made.differing(want).items() if place[0] in want.shapes}


def _settled(
    fields: list[str], probed: Mapping[str, Influence], made: Skeleton, want: Skeleton, family: str
) -> tuple[str, int] | None:
    """The next field whose value is known, with the value; None if no field is open.

    Raises:
        Unsayable: the sizes that change with this field alone ask for different values.
    """
    counts: dict[Place, int] = defaultdict(int)
    for field in fields:
        for place in probed[field].slopes:
            counts[place] += 1
    for field in fields:
        found = probed[field]
        wishes = {}
        for (name, dim), slope in found.slopes.items():
            if counts[name, dim] == 1 and len(want.shapes.get(name, ())) > dim:
                wishes[name, dim] = found.value + (want.shapes[name][dim] - made.shapes[name][dim]) / slope
        if not wishes:
            continue
        value = next(iter(wishes.values()))
        if any(wish != value for wish in wishes.values()) or value != int(value) or value < 1:
            raise Unsayable(field, wishes, family, found.value)
        return field, int(value)
    for field in sorted(fields, key=lambda name: _position(name.rpartition(".")[2])):
        return field, probed[field].value
    return None


def _position(name: str) -> int:
    return _FIRST_TO_STAY.index(name) if name in _FIRST_TO_STAY else len(_FIRST_TO_STAY)


def _with_numbers(kind: type[nn.Module], config: Any, model: nn.Module) -> Any:
    """The configuration with the epsilons and other real numbers that the modules of ``model`` keep.

    A number that differs and follows no field is left for the comparison of outputs.

    Raises:
        Unsayable: modules ask for different values of one field.
    """
    want = reals(model)
    before = reals(Skeleton.made(kind, config).module)
    wrong = {place for place in before if want.get(place, before[place]) != before[place]}
    for field in fields_of(config, float) if wrong else ():
        value = value_of(config, field)
        try:
            after = reals(Skeleton.made(kind, changed(config, {field: 2 * value + 1})).module)
        except ValueError:
            continue
        follows = [p for p in before if after.get(p) == 2 * value + 1 and before[p] == value and p in want]
        if not wrong & set(follows):
            continue
        if len({want[place] for place in follows}) > 1:
            wishes = {(name, 0): want[name] for name in follows}
            raise Unsayable(field, wishes, type(config).__name__, value)
        config = changed(config, {field: want[follows[0]]})
    return config


def reals(model: nn.Module) -> dict[str, float]:
    """The real numbers that modules keep as attributes, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is float and not name.startswith("_")
    }
