"""Floating-point instructions in the compiled kernels: in vectors, in scalars, fused."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Arm64: arithmetic is on vectors if its registers are, as in `fadd v0.4s, v1.4s, v2.4s`.
_ARM = re.compile(r"\t(f(?:add|sub|mul|div|sqrt|n?madd|n?msub|mla|mls))\s+([vsd])\d+(?:\.\d+[sd])?,")
_ARM_FUSED = re.compile(r"f(n?madd|n?msub|mla|mls)$")


@dataclass(frozen=True)
class Arithmetic:
    """Numbers of instructions of one object.

    Attributes:
        vector: additions, multiplications, divisions and roots of vectors.
        scalar: the same of single numbers.
        fused: multiplications with an addition that are rounded once.
    """

    vector: int
    scalar: int
    fused: int


def arithmetic_of(disassembly: str) -> Arithmetic:
    """The arithmetic in the output of ``objdump -d`` for Arm64."""
    found = _ARM.findall(disassembly)
    vector = sum(register == "v" for _, register in found)
    fused = sum(bool(_ARM_FUSED.match(name)) for name, _ in found)
    return Arithmetic(vector, len(found) - vector, fused)


def of_arm_objects(folder: Path, objdump: str) -> Iterator[tuple[str, Arithmetic]]:
    """The name of each object of a kernel and its arithmetic."""
    for path in sorted(folder.glob("baseline_*.o")):
        text = subprocess.run([objdump, "-d", str(path)], capture_output=True, text=True, check=True).stdout
        yield path.stem.removeprefix("baseline_"), arithmetic_of(text)
