"""Builds the native kernels with ninja, or nothing where there is no compiler.

Everything else about the package stands in pyproject.toml. torch is not needed: the kernels take addresses.

Environment:
    SPARSEKERN_NO_NATIVE=1: build no native code; the package then runs on its reference backend.
    CXX: the compiler.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent / "csrc"

# No fused multiply-add and no reassociation: all instruction sets compute the same bits. The two relaxations
# change no result; they let the compiler vectorise square roots and selections.
KERNEL_FLAGS = "-O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti"
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -DNDEBUG -Wall -Wextra"
ISA_FLAGS = {"baseline": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}


def compiler() -> list[str] | None:
    """The command of the C++ compiler, None when there is none."""
    configured = sysconfig.get_config_var("CXX") or ""
    for command in (os.environ.get("CXX", ""), configured, "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def python_include() -> str:
    return sysconfig.get_paths()["include"]


def why_pure() -> str | None:
    """Why no native code can or shall be built here; None when it is to be built."""
    if os.environ.get("SPARSEKERN_NO_NATIVE") == "1":
        return "SPARSEKERN_NO_NATIVE=1"
    if sys.platform not in ("linux", "darwin"):
        return f"the native kernels are not built on {sys.platform}"
    command = compiler()
    if command is None:
        return "there is no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <Python.h>\n#include <atomic>\n#include <vector>\n")
        flags = ["-std=c++17", f"-I{python_include()}", "-fsyntax-only"]
        result = subprocess.run([*command, *flags, str(probe)], capture_output=True, text=True)
    if result.returncode != 0:
        return f"{command[0]} cannot compile against Python: {result.stderr.strip()[-500:]}"
    return None


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def ninja_text(target: Path, build: Path) -> str:
    """The whole build as a ninja file; the flags of an instruction set go to its own file alone."""
    import pybind11

    command = compiler()
    assert command is not None
    includes = f"-isystem {pybind11.get_include()} -isystem {python_include()}"
    sources = [("module", CSRC / "module.cpp", f"-O2 {includes}")]
    sources += [(name, CSRC / "cpu" / f"{name}.cpp", "-O2") for name in ("dispatch", "moments", "plan")]
    for isa in isas():
        path = CSRC / "cpu" / f"kernels_{isa}.cpp"
        sources.append((path.stem, path, f"{KERNEL_FLAGS} {ISA_FLAGS[isa]}"))
    link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"cxx = {shlex.join(command)}",
        "rule compile",
        f"  command = $cxx {COMMON_FLAGS} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link} $in -o $out",
    ]
    for name, path, flags in sources:
        lines += [f"build {escape(build / name)}.o: compile {escape(path)}", f"  flags = {flags}"]
    objects = " ".join(f"{escape(build / name)}.o" for name, _, _ in sources)
    lines += [f"build {escape(target)}: link {objects}", f"default {escape(target)}", ""]
    return "\n".join(lines)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """``build_ext`` that leaves the compiling to ninja: in parallel, and again only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_text(target, build))
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = "ninja"
        try:
            subprocess.run([program, "-C", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "sparsekern: the native kernels did not compile (see above). With SPARSEKERN_NO_NATIVE=1 the "
                "package is installed without them."
            ) from error


reason = why_pure()
if reason is not None:
    print(f"sparsekern: building without native kernels: {reason}", file=sys.stderr)
setup(
    ext_modules=[Extension("sparsekern._C", sources=[])] if reason is None else [],
    cmdclass={"build_ext": NinjaBuild},
)
