"""The search for the groups at fault, on programs that are a few lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from sparsekern.graph.prove.trial import Layout, Outcome, search

GROUPS = range(12)


class Program:
    """Uses one group after the other, and stops at the first that is smaller and must not be."""

    def __init__(self, whole: set[int], pairs: Sequence[tuple[int, int]] = ()) -> None:
        self.whole, self.pairs, self.runs = whole, pairs, 0

    def __call__(self, smaller: Sequence[int]) -> Outcome:
        self.runs += 1
        for group in GROUPS:
            together = any(b == group and {a, b} <= set(smaller) for a, b in self.pairs)
            if together or (group in smaller and group in self.whole):
                return Outcome(f"at {group}", group, list(range(group, -1, -1)))
        return Outcome(None)


@pytest.mark.parametrize("whole", [set(), {0}, {11}, {3, 4}, {0, 5, 6, 11}, set(GROUPS)])
def test_finds_exactly_those_at_fault(whole: set[int]) -> None:
    program = Program(whole)
    assert dict(search(program, GROUPS)) == {group: f"at {group}" for group in whole}
    # The program stops at the fault, so each fault takes one run, and one more run succeeds.
    assert program.runs == len(whole) + 1


def test_of_two_that_fail_together_the_later_stays() -> None:
    assert dict(search(Program(set(), [(2, 7), (7, 9)]), GROUPS)) == {7: "at 7"}


def test_a_fault_long_before_the_stop_is_found() -> None:
    class Late(Program):
        def __call__(self, smaller: Sequence[int]) -> Outcome:
            self.runs += 1
            return Outcome("late", 99, list(reversed(GROUPS))) if 1 in smaller else Outcome(None)

    program = Late(set())
    assert dict(search(program, GROUPS)) == {1: "late"}
    assert program.runs <= 9


def test_nothing_to_search() -> None:
    assert dict(search(Program({1}), [])) == {}


def test_a_program_that_fails_anyhow_is_refused() -> None:
    with pytest.raises(ValueError, match="a second run of its forward differs from the first: always"):
        list(search(lambda smaller: Outcome("always", 3, [2, 1]), GROUPS))


def test_layout_says_what_stays() -> None:
    channels = {0: (np.array([0, 1, 2, -1]), None), 4: (None, np.array([2, 2, 1, 1]))}
    layout = Layout({0: (4, 3), 4: (5, 4)}, channels, np.array([0, 0, 1]))
    parts = layout.parts(np.array([False, True, False]))
    assert parts[0].new_shape == (3, 3)
    assert parts[0].keep[0].tolist() == [0, 2, 3]
    assert parts[4].new_shape == (5, 2)
    assert list(layout.groups(4)) == [0, 1]
