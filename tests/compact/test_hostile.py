"""Malformed files and plans raise one ValueError that names the fault, and nothing changes."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compact.networks import unchanged
from compact.test_load_errors import header, refused, rewrite
from torch import Tensor, nn

from sparsekern.compact import Plan, TensorPlan, compact, shrink

FLIPS = int(os.environ.get("SPARSEKERN_FLIPS", "200"))


def document(indices: list[Any], tensors: dict[str, Any]) -> str:
    return json.dumps({"format": "sparsekern.plan", "version": 1, "indices": indices, "tensors": tensors})


LONG = ",".join(f"{2 * n}-{10**7 + 2 * n}" for n in range(400))
HUGE: dict[str, str] = {
    "one run": document(["0-9999999999"], {"stem.weight": {"shape": [10**10, 3, 3, 3], "keep": {"0": 0}}}),
    "many runs": document([LONG], {"stem.weight": {"shape": [8, 3, 3, 3], "keep": {"0": 0}}}),
    "many sets": document(
        [f"{n}-{2**23 + n}" for n in range(200)],
        {f"t{n}": {"shape": [2**24], "keep": {"0": n}} for n in range(200)},
    ),
    "the same run": document(
        ["0-7," * 500 + "0-7"], {"stem.weight": {"shape": [8, 3, 3, 3], "keep": {"0": 0}}}
    ),
    "many dimensions": document(["0"], {"stem.weight": {"shape": [1] * 5000, "keep": {"4999": 0}}}),
    "deep": "[" * 10**5,
    "deep sizes": document([], {"stem.weight": {"shape": [8, 3, 3, 3], "keep": {}, "sizes": {"a": [[[]]]}}}),
    "a long number": document([], {"stem.weight": {"shape": [8, 3, 3, 3], "keep": {"9" * 5000: 0}}}),
    "a name twice": '{"format": "sparsekern.plan", "version": 1, "version": 1, "indices": [], "tensors": {}}',
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_a_short_plan_takes_little_memory(text: str, path: Path) -> None:
    rewrite(path, plan=text)
    tracemalloc.start()
    try:
        refused(path, "")
        with pytest.raises(ValueError):
            Plan.from_json(text)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [None, 3, [], "", b"\xff", "\ud800"])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="^text: got no valid JSON"):
        Plan.from_json(text)


PARTS: dict[str, Any] = {
    "a text for a shape": {"shape": "88"},
    "a float": {"shape": (8.0,)},
    "True": {"shape": (True, 8)},
    "a list of dimensions": {"shape": (8,), "keep": [np.arange(4)]},
    "a text for a dimension": {"shape": (8,), "keep": {"0": np.arange(4)}},
    "a dimension True": {"shape": (8, 8), "keep": {True: np.arange(4)}},
    "a list of sizes": {"shape": (8,), "sizes": ["heads"]},
    "a number for a size": {"shape": (8,), "sizes": {"heads": 4}},
    "sizes by True": {"shape": (8,), "sizes": {"heads": (0, True)}},
    "sizes by 0": {"shape": (8,), "sizes": {"heads": (0, 0)}},
    "sizes by a float": {"shape": (8,), "sizes": {"heads": (0, 2.0)}},
    "sizes of a number": {"shape": (8,), "sizes": {3: (0, 2)}},
}


@pytest.mark.parametrize("given", PARTS.values(), ids=PARTS)
def test_a_part_made_by_hand_is_checked(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^(shape|keep|sizes): "):
        TensorPlan(**given)
    with pytest.raises(ValueError, match="^tensors: "):
        Plan([given])  # type: ignore[arg-type]


class Guarded(nn.Module):
    """A module of a user with numbers of many kinds, only one of which counts its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.count, self.half, self.other = 8, 4, 7
        self.trusted, self.ratio, self.name = False, 8.0, "8"
        self.__dict__["guarded"] = 8
        self.__dict__["__dunder__"] = 8

    @property
    def guarded(self) -> int:
        return 8

    @guarded.setter
    def guarded(self, value: int) -> None:
        raise AssertionError("a plan has called a setter")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def cut_to_half(path: str, per: int = 1) -> Plan:
    kept = {0: np.arange(4)}
    return Plan(
        {"linear.weight": TensorPlan((8, 4), kept, {path: (0, per)}), "linear.bias": TensorPlan((8,), kept)}
    )


@pytest.mark.parametrize(("path", "per", "value"), [("count", 1, 4), ("half", 2, 2)])
def test_the_size_that_is_cut_follows(path: str, per: int, value: int) -> None:
    assert getattr(compact(Guarded(), cut_to_half(path, per)), path) == value


@pytest.mark.parametrize(
    "path",
    [
        *("trusted", "other", "half", "ratio", "name", "guarded", "__dunder__", "training", "nothing"),
        *(
            "no.module",
            "linear.out_features",
            "_parameters",
            "linear.weight",
            "__class__",
            "",
            ".",
            "linear.",
        ),
    ],
)
def test_no_other_attribute_can_be_set(path: str) -> None:
    model = Guarded()
    before = {
        name: vars(model)[name] for name in ("count", "half", "other", "trusted", "ratio", "name", "training")
    }
    for use in (compact, shrink):
        with unchanged(model), pytest.raises(ValueError, match="is no number in this one"):
            use(model, cut_to_half(path))
    assert {name: vars(model)[name] for name in before} == before


def test_two_tensors_do_not_disagree_about_a_size() -> None:
    model = Guarded()
    model.more = nn.Linear(4, 8)
    plan = cut_to_half("count")
    other = {0: np.arange(6)}
    parts = {
        "more.weight": TensorPlan((8, 4), other, {"count": (0, 1)}),
        "more.bias": TensorPlan((8,), other),
    }
    with unchanged(model), pytest.raises(ValueError, match="'count' becomes 4 by one tensor, 6 by another"):
        compact(model, Plan({**plan.tensors, **parts}))


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        old = header(path)
        new = change(old)
        text = (new if isinstance(new, str) else json.dumps(old)).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def entry(**changes: Any) -> Callable[[Path], None]:
    return with_header(lambda head: head["stem.weight"].update(changes))


HEADERS: dict[str, Callable[[Path], None]] = {
    "deep": with_header(lambda _: '{"a":' * 10**5),
    "a name twice": with_header(lambda head: json.dumps(head)[:-1] + ', "stem.weight": 1}'),
    "NaN": entry(data_offsets=[0, float("nan")]),
    "texts and numbers": entry(data_offsets=[0, "9"]),
    "True": entry(data_offsets=[False, True]),
    "negative": entry(data_offsets=[0, -4]),
    "beyond everything": entry(data_offsets=[0, 2**70]),
    "a shape beyond everything": entry(shape=[2**40, 2**40]),
    "a shape of texts": entry(shape=["8"]),
    "no such type": entry(dtype="F7"),
    "a number for a type": entry(dtype=3),
    "a list for an entry": with_header(lambda head: head.update({"stem.weight": []})),
    "numbers in the metadata": with_header(lambda head: head["__metadata__"].update(plan=3)),
    "a list of metadata": with_header(lambda head: head.update(__metadata__=[])),
    "half a pair for a name": with_header(lambda head: head.update({"\ud800": head.pop("stem.weight")})),
    "an empty name": with_header(lambda head: head.update({"": head.pop("stem.weight")})),
    "a list": with_header(lambda _: "[]"),
    "longer than the file": lambda path: path.write_bytes(
        (10**7).to_bytes(8, "little") + path.read_bytes()[8:]
    ),
    "longer than all": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
}


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused(damage: Callable[[Path], None], path: Path) -> None:
    damage(path)
    refused(path, "")


@pytest.mark.parametrize("tied", ["[]", "3", '{"a": []}', '{"a": {"b": 1}}', "{", "[" * 10**5, '{"a": null}'])
def test_hostile_ties_are_refused(tied: str, path: Path) -> None:
    rewrite(path, tied=tied)
    refused(path, "expected a file that fits this Chain")


def test_changed_bytes_are_found_wherever_they_are(path: Path) -> None:
    data = path.read_bytes()
    source = np.random.default_rng(0)
    end = 8 + int.from_bytes(data[:8], "little")
    for number in range(FLIPS):
        changed = bytearray(data)
        for _ in range(int(source.integers(1, 4))):
            changed[int(source.integers(end if number % 4 else len(data)))] = int(source.integers(256))
        path.write_bytes(changed)
        if bytes(changed) != data:
            refused(path, "")
