"""The CUDA kernels as a program for the CPU, also with ThreadSanitizer and with one barrier removed.

    python tests/cuda/mutants.py     # about three minutes; a line for each barrier

A barrier whose removal nothing notices is either redundant or not tested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
EMULATION, RACES = HERE / "emulation", HERE / "races"
COMPILER = os.environ.get("CXX", "g++")

FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIE",
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    "-Wno-unknown-pragmas",
)
SANITIZED = ("-fsanitize=thread",)

KERNELS = ("norm_act.cu", "finish.cu", "moments.cu")
"""Files of csrc/cuda with kernels of their own; those of the headers are in races/kernels.cpp."""

HOST = ("library.cpp", "cut.cpp", "norm.cpp")

ORDERS = ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1))
"""Order of blocks and threads, and whether a warp runs as far as it can."""

BARRIER = re.compile(r"__syncthreads\(\);")
RACE = re.compile(r"SUMMARY: ThreadSanitizer: data race .* in (?:void |sparsekern::cuda::)*(\w+)")


@dataclass(frozen=True)
class Barrier:
    """A barrier of the sources.

    Attributes:
        file: path below csrc/cuda.
        line: its line, from 1.
        start, stop: its characters in the text.
    """

    file: str
    line: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def kind(self) -> str:
        """What of the drive runs it."""
        return "norms" if self.file.startswith("norm") else "steps"


def barriers() -> Iterator[Barrier]:
    """All barriers of the kernels."""
    for path in sorted((CSRC / "cuda").glob("*.cu*")):
        text = path.read_text()
        for found in BARRIER.finditer(text):
            yield Barrier(path.name, text.count("\n", 0, found.start()) + 1, found.start(), found.end())


class Program:
    """The drive, compiled from sources that may differ from those of the project.

    Args:
        folder: for its files.
        csrc: the sources.
        sanitized: with ThreadSanitizer.
    """

    def __init__(self, folder: Path, csrc: Path = CSRC, *, sanitized: bool = False) -> None:
        self.folder, self.csrc, self.sanitized = folder, csrc, sanitized
        self.path = folder / "drive"

    def build(self, reuse: Program | None = None, changed: str = "") -> Program:
        """Compile; with `reuse`, only what the file `changed` belongs to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cuda = self.csrc / "cuda"
        sources = [RACES / "kernels.cpp", RACES / "drive.cpp", EMULATION / "fibers.cpp"]
        sources += [(RACES if self.sanitized else EMULATION) / "switching.cpp"]
        sources += [cuda / name for name in (*KERNELS, *HOST)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self._object(source, reuse, changed), sources))
        sanitizer = SANITIZED if self.sanitized else ()
        script = f"-Wl,-T,{EMULATION / 'shared.ld'}"
        subprocess.run([COMPILER, *sanitizer, *objects, script, "-o", str(self.path)], check=True)
        return self

    def _object(self, source: Path, reuse: Program | None, changed: str) -> str:
        owner = changed if changed in KERNELS else "kernels.cpp"
        name = f"{source.stem}.o"
        if reuse is not None and source.name != owner:
            return str(reuse.folder / name)
        # The scheduler is no part of what is checked.
        own = source.parent in (EMULATION, RACES) and source.stem in ("fibers", "switching")
        sanitizer = SANITIZED if self.sanitized and not own else ()
        includes = (f"-I{EMULATION}", f"-I{self.csrc / 'cuda'}")
        target = self.folder / name
        command = [COMPILER, *FLAGS, *sanitizer, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    def run(self, order: int, starve: int, kind: str = "") -> str:
        """The hash that it prints, or how it ended."""
        ended = self._ended(order, starve, kind)
        return ended.stdout.strip() if ended.returncode == 0 else f"exit {ended.returncode}"

    def races(self, kind: str = "") -> set[str]:
        """The functions with races that ThreadSanitizer reports."""
        ended = self._ended(0, 0, kind)
        if ended.returncode not in (0, 66):
            raise RuntimeError(
                f"drive: got exit status {ended.returncode}, expected 0 or 66:\n{ended.stderr}"
            )
        return set(RACE.findall(ended.stderr))

    def _ended(self, order: int, starve: int, kind: str) -> subprocess.CompletedProcess[str]:
        # Without randomised addresses: old ThreadSanitizers know only some of them.
        command = [str(self.path), str(order), str(starve), *([kind] if kind else [])]
        if self.sanitized and (setarch := shutil.which("setarch")):
            command = [setarch, "-R", *command]
        options = {"TSAN_OPTIONS": "exitcode=66 history_size=2 report_signal_unsafe=0"}
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | options, timeout=1200)


def without(barrier: Barrier, folder: Path) -> Path:
    """A copy of the sources without that barrier."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("*.o", "__pycache__"))
    path = copy / "cuda" / barrier.file
    text = path.read_text()
    path.write_text(text[: barrier.start] + ";" + text[barrier.stop :])
    return copy


def noticed(barrier: Barrier, folder: Path, plain: Program, sanitized: Program) -> str:
    """How the removal of a barrier shows; empty where it does not."""
    want = plain.run(0, 0, barrier.kind)
    csrc = without(barrier, folder)
    mutant = Program(folder / "plain", csrc).build(plain, barrier.file)
    found = [name for name in ORDERS if mutant.run(*name, barrier.kind) != want]
    if found:
        return "order " + ", ".join(f"{order}{' starving' if starve else ''}" for order, starve in found)
    mutant = Program(folder / "sanitized", csrc, sanitized=True).build(sanitized, barrier.file)
    return ", ".join(sorted(mutant.races(barrier.kind)))


def main() -> None:
    """Print how each barrier's removal shows."""
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = Program(folder / "plain").build()
        sanitized = Program(folder / "sanitized", sanitized=True).build()
        races = sanitized.races()
        print("unchanged:", ", ".join(sorted(races)) or "no race", flush=True)
        for number, barrier in enumerate(barriers()):
            how = noticed(barrier, folder / str(number), plain, sanitized)
            missed += not how
            print(f"{barrier}: {how or 'NOT NOTICED'}", flush=True)
            shutil.rmtree(folder / str(number))
    sys.exit(1 if missed or races else 0)


if __name__ == "__main__":
    main()
