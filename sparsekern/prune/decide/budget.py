"""Budgets, floors and rounding: checks of the user's arguments, and whether the network can meet them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import numpy as np
from torch import nn

from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.allocate import Problem, smallest
from sparsekern.runtimes import check_runtime

Unit = Literal["macs", "params", "latency"]
UNITS: tuple[Unit, ...] = get_args(Unit)


def check_keep(keep: object) -> float:
    """Return ``keep`` as a float, or raise a ValueError."""
    if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep!r}, expected the share of the cost that stays, in (0, 1]")
    return float(keep)


def check_unit(of: object, runtime: object = "torch") -> Unit:
    """Check ``of``, and the runtime that latencies are measured in.

    Returns:
        ``of``.

    Raises:
        ValueError: ``of`` names no cost, ``runtime`` no runtime, or a runtime comes with another cost.
        ModuleNotFoundError: the runtime is not installed.
    """
    check_runtime(runtime)
    for unit in UNITS:
        if of == unit:
            if runtime != "torch" and unit != "latency":
                raise ValueError(f"runtime: got {runtime!r} with of={of!r}, expected it with of='latency'")
            return unit
    raise ValueError(f"of: got {of!r}, expected one of {', '.join(map(repr, UNITS))}")


def check_depth(depth: object, of: str) -> bool:
    """Return ``depth``, or raise a ValueError if it is no bool or does not go with the cost."""
    if not isinstance(depth, bool):
        raise ValueError(f"depth: got {depth!r}, expected True or False")
    if depth and of == "latency":
        raise ValueError(
            "depth: got True with of='latency', expected of='macs' or 'params': latencies are measured for "
            "the ops of all blocks"
        )
    return depth


def check_penalty(penalty: object) -> float:
    """Return ``penalty`` as a float, or raise a ValueError."""
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty: got {penalty!r}, expected a finite number >= 0")
    return float(penalty)


def round_to_choices(round_to: int | str | None, model: nn.Module, shrink: bool) -> tuple[int, ...]:
    """The multiples to try for group widths, best first.

    A number gives itself alone. None means ``"auto"`` with ``shrink``, else 1. ``"auto"`` begins at 16 on a
    CPU, where oneDNN computes in blocks of 16 channels. On a GPU it begins at 8, because tensor cores need
    multiples of 8 in 16-bit dtypes. The dtype of the parameters does not tell: under autocast it is float32.
    Smaller multiples follow for networks that are too narrow.

    Raises:
        ValueError: ``round_to`` is neither ``"auto"`` nor a whole number of at least 1.
    """
    if round_to is None:
        round_to = "auto" if shrink else 1
    if round_to == "auto":
        best = 16 if next(model.parameters()).device.type == "cpu" else 8
        return tuple(multiple for multiple in (16, 8, 4, 1) if multiple <= best)
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"round_to: got {round_to!r}, expected a whole number >= 1 or 'auto'")
    return (round_to,)


def resolve_floors(min_channels: int | Mapping[str, int], graph: ChannelGraph) -> np.ndarray:
    """The smallest number of channels that each group keeps, int64 ``[groups]``.

    Args:
        min_channels: one number for all groups, or numbers by pattern (as in :mod:`fnmatch`) of a group's
            name. The first matching pattern applies; a group without one keeps at least 1. A list of blocks
            needs a pattern other than ``"*"``, and its number counts all of the list's modules.
        graph: the groups.

    Raises:
        ValueError: ``min_channels`` is of another type, a number is below 1, or a pattern matches no group.
    """
    patterns = min_channels if isinstance(min_channels, Mapping) else ("*",)
    if not isinstance(min_channels, (int, Mapping)) or not all(isinstance(name, str) for name in patterns):
        raise ValueError(
            f"min_channels: got {min_channels!r}, expected a whole number >= 1, or such numbers by pattern "
            f"of group names"
        )
    rules = dict(min_channels) if isinstance(min_channels, Mapping) else {"*": min_channels}
    for pattern, number in rules.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"min_channels: got {number!r} for {pattern!r}, expected a whole number >= 1")
        if not any(fnmatchcase(group.name, pattern) for group in graph.groups):
            names = ", ".join(group.name for group in graph.groups[:5])
            raise ValueError(
                f"min_channels: got {pattern!r}, which matches no group, expected a pattern of group names, "
                f"such as {names}"
            )
    floors = [
        next(
            (
                number
                for pattern, number in rules.items()
                if fnmatchcase(group.name, pattern) and (pattern != "*" or not group.of_blocks)
            ),
            1,
        )
        for group in graph.groups
    ]
    return graph.least_kept(floors)


def first_feasible(choices: Sequence[int], problem_of: Callable[[int], Problem], keep: float) -> Problem:
    """The problem with the first ``round_to`` of ``choices`` whose smallest network costs at most ``keep``.

    Raises:
        ValueError: no choice meets ``keep``, see :func:`check_feasible`.
    """
    for multiple in choices[:-1]:
        problem = problem_of(multiple)
        if problem.cost(smallest(problem)) <= keep * problem.whole:
            return problem
    problem = problem_of(choices[-1])
    check_feasible(problem, keep)
    return problem


def check_feasible(problem: Problem, keep: float) -> None:
    """Raise a ValueError when even the smallest network within the floors costs more than ``keep`` allows."""
    kept = smallest(problem)
    reachable = problem.cost(kept) / problem.whole
    if reachable <= keep:
        return
    # The group with the costliest floor: its complete removal would save most.
    price = problem.price(kept)
    of_groups = [float(price[group.channels[kept[group.channels]]].sum()) for group in problem.graph.groups]
    costliest = problem.graph.groups[int(np.argmax(of_groups))]
    floor = int(kept[costliest.channels].sum())
    reasons = f"min_channels and round_to={problem.round_to}"
    if len(set(problem.roles.tolist())) < len(problem.roles):
        reasons = f"min_channels, round_to={problem.round_to} and equal"
    # Rounded up, so that the value in the error is feasible.
    smallest_keep = np.ceil(reachable * 1e4) / 1e4
    raise ValueError(
        f"keep: got {keep!r} of {problem.of}, expected at least {smallest_keep:.4f}, the smallest share that "
        f"floors and frozen layers allow; the costliest floor is {costliest.name} with {floor} channels "
        f"({reasons}), and {len(problem.graph.frozen)} tensors and "
        f"modules are frozen: print(sparsekern.trace(model, example_inputs)) shows why"
    )
