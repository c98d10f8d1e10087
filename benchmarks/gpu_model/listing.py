"""Reads a listing of machine code (SASS): instructions, blocks, loops, and the paths through a loop."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LINE = re.compile(
    r"\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<if>!?U?P\w+)\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<rest>[^;]*);"
)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        at: its address.
        predicate: the condition under which it has an effect; empty for none.
        opcode: its name with all suffixes, for example ``LDG.E.128``.
        operands: the rest of the line.
    """

    at: int
    predicate: str
    opcode: str
    operands: str

    @functools.cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @functools.cached_property
    def width(self) -> int:
        """Bytes of an access to memory by one thread."""
        return next((_WIDTHS[part] for part in self.opcode.split(".")[1:] if part in _WIDTHS), 4)

    @functools.cached_property
    def is_wide(self) -> bool:
        return self.width == 16 and self.name in ("LDG", "STG")

    @functools.cached_property
    def target(self) -> int | None:
        """The address that a branch or call names."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        """Whether the next instruction is never executed after this one."""
        if self.name == "BRA":
            return not self.predicate and not re.match(r"!?U?P\d", self.operands)
        return self.name in ("EXIT", "RET", "BRX") and not self.predicate

    @functools.cached_property
    def registers(self) -> set[int]:
        """All registers that it names, those of wide operands included."""
        found = set()
        for i, number in enumerate(re.findall(r"\bR(\d+)", self.operands)):
            wide = self.width // 4 if i == 0 and self.name == "LDG" else 1
            found |= set(range(int(number), int(number) + max(1, wide)))
        return found


def read(lines: Sequence[str]) -> list[Instruction]:
    """The instructions of one function."""
    found = (_LINE.match(line) for line in lines)
    return [
        Instruction(int(match["at"], 16), match["if"] or "", match["op"], match["rest"].strip())
        for match in found
        if match
    ]


@dataclass(frozen=True)
class Loop:
    """Instructions from the target of a backward branch to that branch."""

    body: tuple[Instruction, ...]

    @functools.cached_property
    def wide_loads(self) -> int:
        return sum(one.is_wide and one.name == "LDG" for one in self.body)


def loops(code: Sequence[Instruction]) -> Iterator[Loop]:
    """The loops with wide loads that contain no other one; each ends at the last branch to its beginning."""
    position = {one.at: i for i, one in enumerate(code)}
    ends: dict[int, int] = {}
    for i, one in enumerate(code):
        if one.name == "BRA" and one.target is not None and one.target <= one.at and one.target in position:
            ends[position[one.target]] = i
    found = {begin: Loop(tuple(code[begin : end + 1])) for begin, end in ends.items()}
    wide = {begin: ends[begin] for begin, loop in found.items() if loop.wide_loads}
    for begin, end in wide.items():
        if not any(begin < b and e <= end for b, e in wide.items()):
            yield found[begin]


def main_loop(code: Sequence[Instruction]) -> Loop | None:
    """The loop over packs of sixteen bytes: that with the most wide loads, and the shortest of these."""
    return max(loops(code), key=lambda loop: (loop.wide_loads, -len(loop.body)), default=None)


def _blocks(body: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Ranges of instructions without a branch or a target inside."""
    position = {one.at: i for i, one in enumerate(body)}
    starts = {0}
    for i, one in enumerate(body):
        if one.name in ("BRA", "EXIT", "RET", "CALL"):
            starts.add(i + 1)
            if one.target in position:
                starts.add(position[one.target])
    ordered = [start for start in sorted(starts) if start < len(body)]
    return list(zip(ordered, [*ordered[1:], len(body)], strict=True))


def _accesses(part: Sequence[Instruction]) -> tuple[int, int]:
    """Wide loads and wide stores of a block. Stores under a condition are those of unscaled gradients."""
    wide = [one for one in part if one.is_wide]
    loads = sum(one.name == "LDG" for one in wide)
    return loads, sum(one.name == "STG" and not one.predicate for one in wide)


def path(loop: Loop, reads: int, writes: int) -> list[Instruction]:
    """The longest way through the loop, of those with the most wide loads and their share of wide stores.

    Blocks with calls are left out: those are the slow paths of divisions and roots, for denormal numbers and
    infinities.

    Args:
        loop: the loop.
        reads: loads of each pack.
        writes: stores of each pack.

    Raises:
        ValueError: there is no such way.
    """
    body = loop.body
    position = {one.at: i for i, one in enumerate(body)}
    blocks = _blocks(body)
    of_start = {start: k for k, (start, _) in enumerate(blocks)}
    # For each block and number of stores before it: loads and length of the best way to it, and the block
    # before.
    best: list[dict[int, tuple[int, int, tuple[int, int] | None]]] = [{} for _ in blocks]
    best[0][0] = 0, 0, None
    ends: dict[tuple[int, int], tuple[int, int]] = {}
    for k, (start, stop) in enumerate(blocks):
        part = body[start:stop]
        if any(one.name == "CALL" and not one.predicate for one in part):
            continue
        more_loads, more_stores = _accesses(part)
        last = part[-1]
        followers = [] if last.always_leaves else [k + 1]
        if last.name == "BRA" and last.target in position:
            followers.append(of_start[position[last.target]])
        for before, (loads, length, _) in best[k].items():
            after, total = before + more_stores, (loads + more_loads, length + len(part))
            if last.target == body[0].at and after * reads == total[0] * writes:
                ends[k, before] = total
            for follower in followers:
                if k < follower < len(blocks) and total > best[follower].get(after, (-1, -1, None))[:2]:
                    best[follower][after] = *total, (k, before)
    if not ends:
        raise ValueError(
            f"loop at {body[0].at:#x}: got no way with {writes} wide stores for {reads} loads, "
            "expected one without calls"
        )
    at: tuple[int, int] | None = max(ends, key=lambda end: ends[end])
    taken = []
    while at is not None:
        taken.append(at[0])
        at = best[at[0]][at[1]][2]
    return [one for k in reversed(taken) for one in body[slice(*blocks[k])]]


def bytes_in_flight(way: Sequence[Instruction]) -> int:
    """The most bytes that a thread has requested before an instruction waits for one of its loads.

    Narrow loads under a condition stand for wide ones of other addresses, and do not count.
    """
    pending: dict[int, int] = {}
    most = 0
    for one in way:
        is_load = one.name == "LDG"
        if is_load and one.predicate and not one.is_wide:
            continue
        if pending and one.registers & set(pending):
            pending = {}
        if is_load:
            first = re.search(r"R(\d+)", one.operands)
            if first:
                pending |= dict.fromkeys(range(int(first[1]), int(first[1]) + max(1, one.width // 4)), 0)
                pending[int(first[1])] = one.width
        most = max(most, sum(pending.values()))
    return most


def kind(one: Instruction) -> str:
    """The pipe of an instruction: float32, float64, integer, special, or other."""
    name = one.name
    if name in ("FADD", "FMUL", "FFMA", "IMAD"):
        return "float32"
    if name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"):
        return "float64"
    if name == "MUFU" or name in ("F2F", "F2I", "I2F"):
        return "float64 conversions" if "F64" in one.opcode or "64H" in one.opcode else "special"
    if name in (
        "LDG",
        "STG",
        "LDS",
        "STS",
        "LDC",
        "ULDC",
        "BRA",
        "BSSY",
        "BSYNC",
        "EXIT",
        "CALL",
        "BAR",
        "SHFL",
    ):
        return "other"
    return "integer"


def counts(way: Sequence[Instruction]) -> dict[str, int]:
    """Instructions of each kind."""
    found: dict[str, int] = defaultdict(int)
    for one in way:
        found[kind(one)] += 1
    return dict(found)
