"""Roles: groups that are the same part of different layers and keep the same width.

A configuration file says the width of a part once, for all layers. So a network fits one only if the part is
as wide in every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from torch import nn

from sparsekern.configs import by_config, has_config
from sparsekern.graph import ChannelGraph

Equal = Literal["auto", "role", "config"] | Mapping[str, int] | None


@dataclass(frozen=True, eq=False)
class Roles:
    """Which groups keep the same width.

    Attributes:
        setting: the argument ``equal`` that they follow from, as text; None if every group has its own width.
        numbers: int64 ``[groups]``; the role of each group, numbered from 0.
        divisors: int64 ``[groups]``; the number whose multiples the widths are; 0 leaves it to ``round_to``.
        steps: the widths of a role, int64 in rising order, where a configuration does not accept all of them.
    """

    setting: str | None
    numbers: np.ndarray
    divisors: np.ndarray
    steps: dict[int, np.ndarray]

    def of_problem(self) -> dict[str, Any]:
        """The arguments of a :class:`~sparsekern.prune.decide.problem.Problem`."""
        return {"roles": self.numbers, "divisors": self.divisors, "steps": self.steps}

    @classmethod
    def of(cls, equal: Equal, model: nn.Module, graph: ChannelGraph) -> Roles:
        """The roles of the groups of a network.

        Args:
            equal: as for :class:`sparsekern.Pruner`.
            model: the network at full size.
            graph: its groups.

        Raises:
            ValueError: ``equal`` is not valid, or a pattern matches no role.
        """
        equal, count = resolve_equal(equal, model), len(graph.groups)
        if equal is None:
            return cls(None, np.arange(count), np.zeros(count, np.int64), {})
        names = [role_name(model, group.name) for group in graph.groups]
        sizes = [len(group.channels) for group in graph.groups]
        numbers = _numbered(zip(names, sizes, strict=True))
        steps: dict[int, np.ndarray] = {}
        if has_config(model):
            numbers, steps = _configured(model, graph, numbers)
        divisors = _divisors(equal, names, numbers) if isinstance(equal, Mapping) else [0] * count
        setting = equal if isinstance(equal, str) else repr(dict(equal))
        return cls(setting, np.array(numbers, np.int64), np.array(divisors, np.int64), steps)


def check_equal(equal: object) -> Equal:
    """Return ``equal``, or raise a ValueError if no network has roles for it."""
    if equal is None or equal in ("auto", "role", "config"):
        return equal
    if not isinstance(equal, Mapping) or not all(isinstance(pattern, str) for pattern in equal):
        raise ValueError(
            f"equal: got {equal!r}, expected 'role', 'config', 'auto', None, or a mapping from patterns of "
            f"roles to whole numbers >= 1"
        )
    for pattern, number in equal.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"equal: got {number!r} for {pattern!r}, expected a whole number >= 1")
    return equal


def resolve_equal(equal: Equal, model: nn.Module) -> Equal:
    """``equal`` with ``"auto"`` replaced: ``"role"`` for a model with a configuration, else None.

    Raises:
        ValueError: ``equal`` is not valid, or ``"config"`` for a model without a configuration.
    """
    equal = check_equal(equal)
    if equal == "auto":
        return "role" if has_config(model) else None
    if equal == "config" and not has_config(model):
        raise ValueError(
            f"equal: got 'config' for a {type(model).__name__}, expected a model with a configuration like "
            f"those of Hugging Face, or equal='role'"
        )
    return equal


def role_name(model: nn.Module, name: str, *, alike: bool = False) -> str:
    """The name of a module or tensor with ``*`` for each position in a ``ModuleList`` or ``Sequential``.

    Args:
        model: the module that ``name`` begins at.
        name: the name, with dots.
        alike: replace only positions among several blocks of one class, such as the layers of a transformer.
    """
    parts, module = name.split("."), model
    for index, part in enumerate(parts):
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and part.isdigit()
        if listed and (not alike or _alike(module)):
            parts[index] = "*"
        module = getattr(module, part, None)  # type: ignore[assignment]
        if not isinstance(module, nn.Module):
            break
    return ".".join(parts)


def lone(equal: Equal, model: nn.Module, graph: ChannelGraph) -> dict[str, str]:
    """The groups that cannot change their width, because the same part of another layer cannot.

    Args:
        equal: as for :class:`sparsekern.Pruner`.
        model: the network at full size.
        graph: its groups.

    Returns:
        The reason by name of group; empty without ``equal``.
    """
    if resolve_equal(equal, model) is None:
        return {}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}

    def part(name: str) -> tuple[str, tuple[int, ...]]:
        return role_name(model, name, alike=True), shapes[name]

    moving = {name for group in graph.groups for name in group.producers}
    fixed = {part(name): name for name, _ in graph.frozen if name in shapes and name not in moving}
    widths: dict[Any, dict[int, str]] = {}
    for group in graph.groups:
        for name in group.producers[:1]:
            widths.setdefault(part(name), {})[len(group.channels)] = name
    found = {}
    for group in graph.groups:
        for key in map(part, group.producers):
            others = {n: name for n, name in widths.get(key, {}).items() if n != len(group.channels)}
            for other in (*others.values(), *([fixed[key]] if key in fixed else ())):
                found[group.name] = (
                    f"{other} cannot get the same width, and equal={equal!r} keeps both as wide"
                )
    return found


def _alike(blocks: nn.Module) -> bool:
    """Whether a container holds several blocks of one class."""
    items = list(blocks.children())
    return len(items) > 1 and len({type(b) for b in items}) == 1 and any(items[0].children())


def _configured(
    model: nn.Module, graph: ChannelGraph, numbers: list[int]
) -> tuple[list[int], dict[int, np.ndarray]]:
    """The roles of the groups and the widths that they may have, as the model's configuration says it."""
    count = max(numbers, default=-1) + 1
    parts: list[list[tuple[str, int]]] = [[] for _ in range(count)]
    sizes = [0] * count
    for group in graph.groups:
        for name, dim in group.members:
            tied = graph.tensors[name].aliases if name in graph.tensors else ()
            parts[numbers[group.id]] += [(alias, dim) for alias in (name, *tied)]
        sizes[numbers[group.id]] = len(group.channels)
    said = by_config(model, parts, sizes)
    merged = [said.numbers[number] for number in numbers]
    new = _numbered(merged)
    steps = {n: np.array(said.widths[old]) for old, n in zip(merged, new, strict=True) if old in said.widths}
    return new, steps


def _numbered(keys: Iterable[object]) -> list[int]:
    """Number equal keys alike, from 0 in the order of their first occurrence."""
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _divisors(equal: Mapping[str, int], names: list[str], numbers: list[int]) -> list[int]:
    """The divisor of every group: that of the first pattern that matches a name of its role."""
    for pattern in equal:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"equal: got {pattern!r}, which matches no role, expected a pattern of roles, such as "
                f"{', '.join(dict.fromkeys(names[:5]))}"
            )
    of_roles: dict[int, int] = {}
    for pattern, divisor in equal.items():
        for name, number in zip(names, numbers, strict=True):
            if fnmatchcase(name, pattern):
                of_roles.setdefault(number, divisor)
    return [of_roles.get(number, 0) for number in numbers]
