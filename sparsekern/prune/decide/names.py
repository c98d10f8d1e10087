"""Criteria and allocators by name, for the command line and the arguments of a Pruner."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsekern.prune.decide import allocate, criteria

CRITERIA: Mapping[str, Callable[[], criteria.Criterion]] = {
    "joint": criteria.default,
    "gradient-count": criteria.GradientCount,
    "magnitude": criteria.Magnitude,
    "random": criteria.Random,
    "redundancy": criteria.Redundancy,
    "shuffled": lambda: criteria.Shuffled(criteria.default()),
    "taylor": criteria.Taylor,
}
ALLOCATORS: Mapping[str, Callable[[], allocate.Allocator]] = {
    "flat": allocate.Flat,
    "global": allocate.Global,
    "uniform": allocate.Uniform,
}


def resolve_select(select: object) -> criteria.Criterion:
    """The criterion for an argument ``select``.

    Args:
        select: a criterion; None for the default; or names of ``CRITERIA`` joined by ``*`` (which binds
            tighter) and ``+``, such as ``"taylor * gradient-count"``.

    Raises:
        ValueError: ``select`` is none of these.
    """
    if select is None:
        return criteria.default()
    if isinstance(select, criteria.Criterion):
        return select
    if not isinstance(select, str):
        raise ValueError(
            f"select: got {select!r}, expected a sparsekern.criteria.Criterion, or names joined by * and +: "
            f"{', '.join(CRITERIA)}"
        )
    total: criteria.Criterion | None = None
    for term in select.split("+"):
        product: criteria.Criterion | None = None
        for name in map(_plain, term.split("*")):
            if name not in CRITERIA:
                raise ValueError(
                    f"select: got {select!r}, expected names joined by * and +: {', '.join(CRITERIA)}"
                )
            product = CRITERIA[name]() if product is None else product * CRITERIA[name]()
        assert product is not None
        total = product if total is None else total + product
    assert total is not None
    return total


def resolve_allocate(allocator: object, default: allocate.Allocator | None = None) -> allocate.Allocator:
    """The allocator for an argument ``allocate``: an allocator, its name, or None for the default.

    Raises:
        ValueError: ``allocator`` is none of these.
    """
    if allocator is None:
        return allocate.Global() if default is None else default
    if isinstance(allocator, allocate.Allocator):
        return allocator
    if isinstance(allocator, str) and _plain(allocator) in ALLOCATORS:
        return ALLOCATORS[_plain(allocator)]()
    raise ValueError(
        f"allocate: got {allocator!r}, expected a sparsekern.allocate.Allocator, or a name: "
        f"{', '.join(ALLOCATORS)}"
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
