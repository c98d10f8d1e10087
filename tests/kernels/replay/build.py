"""Compiling the CPU kernels with replay.cpp, by any compiler, for any machine, with the flags of setup.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def compile_replay(compiler: list[str], isas: list[str], folder: Path) -> Path:
    """The program, linked statically: it runs where the shared libraries of its machine are missing.

    Args:
        compiler: the command of a C++ compiler.
        isas: instruction sets of setup.py that the program has kernels for.
        folder: for the objects and the program.
    """
    setup = _setup()
    has = " ".join(f"-DSPARSEKERN_HAS_{isa.upper()}" for isa in isas)
    sources = [(name, ROOT / path, flags) for name, path, flags in setup.core_sources(isas)]
    sources.append(("replay", Path(__file__).with_name("replay.cpp"), f"-O2 -I{ROOT / 'csrc'} {has}"))

    def compiled(source: tuple[str, Path, str]) -> str:
        name, path, flags = source
        target = str(folder / f"{name}.o")
        command = [*compiler, *setup.COMMON_FLAGS.split(), *flags.split(), "-c", str(path), "-o", target]
        subprocess.run(command, check=True)
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "replay"
    subprocess.run([*compiler, "-static", *objects, "-o", str(program)], check=True)
    return program


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparsekern_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
