"""The machine code of the CUDA kernels: registers, spills, wide loads and stores.

Reads the machine code of the installed library, so it needs no GPU, only ``cuobjdump`` and ``nvdisasm``: in
the CUDA toolkit, in Triton, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.

    python -m benchmarks.sass
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import commit
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.native import cuda_library

TOOLS = ("cuobjdump", "nvdisasm")
DTYPES = {"f": "float32", "d": "float64", "8BFloat16": "bfloat16", "7Float16": "float16"}
UPDATES = {
    "SgdLb0": "SGD",
    "SgdLb1": "SGD momentum",
    "AdamLb0": "Adam(W)",
    "AdamLb1": "Adam(W) amsgrad",
    "ExternalStatistics": "statistics",
    "ExternalMask": "mask",
}
PASSES = {
    "Moments": "norm moments",
    "Normalise": "norm forward",
    "GradSums": "norm sums",
    "Backward": "norm gradients",
}
FEW_TENSORS = 32
"""Tensors of the variants for short lists (`kFewTensors` in csrc/cuda/table.cuh)."""

SMALL = {
    "fold_channels": "channels",
    "store_moments": "norm moments merged",
    "store_sums": "norm sums merged",
    "update_counts": "norm counts",
}


@dataclass
class Kernel:
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def tools_path() -> str:
    """``PATH`` with the folders that may contain the tools."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folders += [str(path) for path in Path(root).glob("*/bin")]
    triton = importlib.util.find_spec("triton")
    for root in (triton.submodule_search_locations or []) if triton else []:
        folders.append(str(Path(root) / "backends/nvidia/bin"))
    path = os.pathsep.join(folders)
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        sys.exit(
            f"found no {' and no '.join(missing)}: "
            f"pip install {' '.join(f'nvidia-cuda-{tool}' for tool in missing)}"
        )
    return path


def run(path: str, *arguments: str) -> list[str]:
    tool = str(shutil.which(TOOLS[0], path=path))
    environment = os.environ | {"PATH": path}
    result = subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def readable(symbol: str) -> str:
    """A readable name of a kernel: its operation and its dtype."""
    found = re.match(
        r"_ZN10sparsekern4cuda(?:4step|9norm_pass)I(f|d|NS0_(?:8BFloat16|7Float16)E)NS0_\d+(\w+?)I(.*)",
        symbol,
    )
    if found is None:
        return next((name for part, name in SMALL.items() if part in symbol), "epilogue")
    dtype = DTYPES[found[1].removeprefix("NS0_").removesuffix("E")]
    if "norm_pass" in symbol:
        activation = re.search(r"Li(\d)E", found[3])
        follows = f" {ACTIVATIONS[int(activation[1])]}" if activation else ""
        return f"{PASSES[found[2].removesuffix('Pass')]}{follows} {dtype}"
    flag = re.search(r"Lb[01]", found[3])
    tensors = re.search(r"ArgumentsILi(\d+)E", found[3])
    short = " short list" if tensors and int(tensors[1]) == FEW_TENSORS else ""
    return f"{UPDATES[found[2] + (flag[0] if flag else '')]}{short} {dtype}"


def kernels(library: Path) -> list[Kernel]:
    path = tools_path()
    found: dict[tuple[str, str], Kernel] = {}
    architecture = symbol = ""

    def current() -> Kernel:
        return found.setdefault((architecture, symbol), Kernel(readable(symbol), architecture))

    for line in run(path, "-res-usage", str(library)):
        if match := re.match(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
            current().registers, current().stack = int(match[1]), int(match[2])
    for line in run(path, "-sass", str(library)):
        if match := re.match(r"\s*code for (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            current().instructions[match[1]] += 1
    return sorted(found.values(), key=lambda kernel: (int(kernel.architecture[3:]), kernel.name))


def main() -> None:
    """Print the table; exit with 1 when a kernel spills or one over tensors has no wide accesses."""
    library = cuda_library.load()
    if library is None:
        sys.exit(str(cuda_library.reason))
    columns = ("registers", "stack", "local accesses", "128-bit loads", "128-bit stores", "instructions")
    table = Table("architecture", "kernel", *columns)
    faults = []
    for kernel in kernels(Path(library._name)):
        local, loads = kernel.count(r"(LDL|STL)(\..*)?"), kernel.count(r"LDG\.E(\.\w+)*\.128(\.\w+)*")
        stores = kernel.count(r"STG\.E(\.\w+)*\.128(\.\w+)*")
        numbers = (kernel.registers, kernel.stack, local, loads, stores, kernel.instructions.total())
        table.add_row(kernel.architecture, kernel.name, *map(str, numbers))
        is_wide = kernel.name.split()[-1] in DTYPES.values()
        writes = not kernel.name.startswith(("statistics", "norm moments", "norm sums"))
        if kernel.stack or local or (is_wide and (not loads or (writes and not stores))):
            faults.append(f"{kernel.name} on {kernel.architecture}")
    console = Console(width=140)
    console.print(table)
    console.print(f"sparsekern {commit()}; none of it has been run on a GPU")
    if faults:
        sys.exit(f"spilled or narrow: {', '.join(faults)}")


if __name__ == "__main__":
    main()
