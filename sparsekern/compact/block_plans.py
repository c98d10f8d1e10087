"""The blocks of a list of modules that stay, as a part of a pruning plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsekern.compact.indices import Runs, check_indices
from sparsekern.files.schema import describe
from sparsekern.graph.numbers import KeptBlocks, after_removal, before_removal

# More modules than any list has; a short text could otherwise ask for very many numbers.
_MOST = 1 << 16


@dataclass(frozen=True)
class ListPlan:
    """The modules of an ``nn.ModuleList`` or ``nn.Sequential`` that stay.

    Attributes:
        count: number of modules before any is removed.
        keep: numbers of the modules that stay: increasing, at least one.

    Raises:
        ValueError: an argument breaks these conditions.
    """

    count: int
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = isinstance(self.count, int) and not isinstance(self.count, bool)
        if not whole or not 1 <= self.count <= _MOST:
            raise ValueError(f"count: got {describe(self.count)}, expected a number of modules")
        kept = check_indices(self.keep, self.count, 0)
        object.__setattr__(self, "keep", tuple(kept.tolist()))

    @property
    def removes_nothing(self) -> bool:
        """Whether all modules stay."""
        return len(self.keep) == self.count

    def then(self, later: ListPlan) -> ListPlan:
        """This plan followed by ``later``, which is for the modules that this one leaves.

        Raises:
            ValueError: ``later`` is for another number of modules.
        """
        if later.count != len(self.keep):
            raise ValueError(f"later: got a list of {later.count} modules, expected {len(self.keep)}")
        return ListPlan(self.count, tuple(self.keep[number] for number in later.keep))

    def after(self, done: ListPlan) -> ListPlan:
        """The rest of this plan after ``done`` was carried out.

        Raises:
            ValueError: ``done`` is for another number of modules, or removed modules that this plan keeps.
        """
        if done.count != self.count or not set(self.keep) <= set(done.keep):
            raise ValueError(
                f"done: got modules {list(done.keep)} of {done.count}, expected {list(self.keep)} of "
                f"{self.count} among them"
            )
        return ListPlan(len(done.keep), tuple(np.searchsorted(done.keep, self.keep).tolist()))


def check_lists(blocks: object) -> dict[str, ListPlan]:
    """The plans of lists of modules by path, without those that remove nothing.

    Raises:
        ValueError: ``blocks`` is something else.
    """
    if not isinstance(blocks, Mapping) or not all(
        isinstance(path, str) and isinstance(part, ListPlan) for path, part in blocks.items()
    ):
        raise ValueError(f"blocks: got {describe(blocks)}, expected str -> ListPlan")
    return {path: blocks[path] for path in sorted(blocks) if not blocks[path].removes_nothing}


def kept_of(blocks: Mapping[str, ListPlan]) -> KeptBlocks:
    """The numbers of the modules that stay, by path of the list."""
    return {path: part.keep for path, part in blocks.items()}


def stays(name: str, blocks: Mapping[str, ListPlan]) -> bool:
    """Whether something of this name, before the removal, stays."""
    return after_removal(name, kept_of(blocks)) is not None


def lists_then(first: Mapping[str, ListPlan], later: Mapping[str, ListPlan]) -> dict[str, ListPlan]:
    """The plans ``first`` followed by ``later``, by the paths before both.

    Raises:
        ValueError: ``later`` is for lists of other lengths.
    """
    result = dict(first)
    for path, part in later.items():
        old = before_removal(path, kept_of(first))
        result[old] = result[old].then(part) if old in result else part
    return result


def lists_after(wanted: Mapping[str, ListPlan], done: Mapping[str, ListPlan]) -> dict[str, ListPlan]:
    """The rest of the plans ``wanted`` after ``done`` was carried out, by the paths that lists have then.

    Raises:
        ValueError: ``done`` removed modules that ``wanted`` keeps.
    """
    result = {}
    for path in {**wanted, **done}:
        outer = {other: part for other, part in wanted.items() if other != path}
        if not stays(path, outer):
            continue
        new = after_removal(path, kept_of(done))
        if path not in wanted or new is None:
            raise ValueError(
                f"done: got a plan that removes modules of {path!r}, expected one that keeps them"
            )
        result[new] = wanted[path].after(done[path]) if path in done else wanted[path]
    return result


def lists_to_json(blocks: Mapping[str, ListPlan], number_of: Any) -> dict[str, Any]:
    """The plans as plain data; ``number_of`` gives the number of a set of indices."""
    return {
        path: {"count": part.count, "keep": number_of(np.array(part.keep, np.int64))}
        for path, part in sorted(blocks.items())
    }


def lists_from_json(entries: Any, sets: Sequence[Runs]) -> dict[str, ListPlan]:
    """The plans that :func:`lists_to_json` wrote.

    Raises:
        ValueError: the data has another form.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"text: got {type(entries).__name__} as 'blocks', expected dict")
    found = {}
    for path, entry in entries.items():
        count, number = _count_and_set(entry)
        if not 1 <= count <= _MOST or not 0 <= number < len(sets):
            raise ValueError(
                f"text: got {describe(entry)} as the modules of {describe(path)}, expected a count and the "
                f"number of a set of indices"
            )
        found[path] = ListPlan(count, tuple(sets[number].within(count, 0).tolist()))
    return found


def _count_and_set(entry: Any) -> tuple[int, int]:
    """The count and the number of a set in plain data; -1 for what is none."""
    fields = entry if isinstance(entry, dict) else {}
    found = [fields.get(key) for key in ("count", "keep")]
    count, number = (
        value if isinstance(value, int) and not isinstance(value, bool) else -1 for value in found
    )
    return count, number


def inside(blocks: Mapping[str, ListPlan], prefix: str) -> dict[str, ListPlan]:
    """The plans for a model that holds the model as its submodule ``prefix``."""
    return {f"{prefix}.{path}" if path else prefix: part for path, part in blocks.items()}


def check_counts(blocks: Mapping[str, ListPlan], lengths: Mapping[str, int]) -> None:
    """Check that the lists of a plan exist in a model with the same lengths.

    Args:
        blocks: the plans of lists.
        lengths: lengths of all lists of the model, by path.

    Raises:
        ValueError: a list is missing or has another length.
    """
    for path, part in blocks.items():
        if lengths.get(path) != part.count:
            raise ValueError(
                f"plan: got a plan for a model with {part.count} modules in the list {path!r}, expected "
                f"{lengths.get(path, 'no such list')} as in this model"
            )


def names_in(names: Iterable[str], blocks: Mapping[str, ListPlan]) -> bool:
    """Whether all of ``names`` belong to removed modules."""
    return bool(blocks) and all(not stays(name, blocks) for name in names)
