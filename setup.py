"""Builds the native kernels with ninja: for the CPU where there is a compiler, for the GPUs of this machine.

Everything else about the package stands in pyproject.toml, except for what depends on the address of the
repository. torch is not needed: the kernels take addresses.

Environment:
    SPARSEKERN_REPOSITORY=https://HOST/OWNER/NAME: the public repository, for the links of the package's page.
    SPARSEKERN_NO_NATIVE=1: build no native code; the package then runs on its reference backend.
    SPARSEKERN_CUDA=1: build CUDA kernels although no GPU is visible. 0: build none.
    SPARSEKERN_CUDA_ARCHITECTURES, TORCH_CUDA_ARCH_LIST: build CUDA kernels for these, such as "8.0;9.0+PTX".
    SPARSEKERN_SANITIZE=1: build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer.
    MAX_JOBS: number of compilers at work at the same time; all cores by default.
    CXX, CUDACXX: the compilers.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from email.parser import HeaderParser
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from cuda_targets import CudaBuild, cuda_build, nvcc  # noqa: E402

# Relative to ROOT, where ninja runs, so that an unpacked sdist can use the objects of the tree it came from.
CSRC = Path("csrc")

# No fused multiply-add and no reassociation anywhere: all ISAs and machines compute the same bits.
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -DNDEBUG -Wall -Wextra"
# The two relaxations change no result; they let the compiler vectorise square roots and selections.
KERNEL_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti"
# Any finding ends the process. Optimisation is lower, because instrumented code takes minutes to optimise.
SANITIZE_FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# The same arithmetic on a GPU: by default nvcc contracts, too.
CUDA_FLAGS = (
    "-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false -DNDEBUG -Werror all-warnings "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -cudart static"
)
ISA_FLAGS = {"baseline": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def compiler() -> list[str] | None:
    """The command of the C++ compiler; None if there is none."""
    configured = sysconfig.get_config_var("CXX") or ""
    for command in (os.environ.get("CXX", ""), configured, "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def python_include() -> str:
    return sysconfig.get_paths()["include"]


def why_pure() -> str | None:
    """The reason why no native code is built here; None if it is built."""
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


def isas(command: list[str]) -> list[str]:
    """The instruction sets that the compiler knows of those of this machine's architecture."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    known = []
    for isa, flags in ISA_FLAGS.items():
        probe = [*command, *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            known.append(isa)
        else:
            print(f"sparsekern: {command[0]} does not know {flags}: building without {isa}", file=sys.stderr)
    return known


def ninja_text(target: Path, build: Path) -> str:
    """The whole build as a ninja file; the flags of an instruction set go to its own file alone."""
    import pybind11

    command = compiler()
    assert command is not None
    includes = f"-isystem {pybind11.get_include()} -isystem {python_include()}"
    known = isas(command)
    with_python = ("module", "norm_module", "runtime", "sources")
    sources = [(name, CSRC / f"{name}.cpp", f"-O2 {includes}") for name in with_python]
    sources += core_sources(known)
    sanitize = SANITIZE_FLAGS if os.environ.get("SPARSEKERN_SANITIZE") == "1" else ""
    link = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"builddir = {escape(build)}",
        f"cxx = {shlex.join(command)}",
        "rule compile",
        f"  command = $cxx {COMMON_FLAGS} $flags {sanitize} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {link} {sanitize} $in -o $out",
    ]
    for name, path, flags in sources:
        lines += [f"build {escape(build / name)}.o: compile {escape(path)}", f"  flags = {flags}"]
    objects = " ".join(f"{escape(build / name)}.o" for name, _, _ in sources)
    lines += [f"build {escape(target)}: link {objects}", f"default {escape(target)}", ""]
    return "\n".join(lines)


def core_sources(known: list[str]) -> list[tuple[str, Path, str]]:
    """Object name, path and flags of all that does not need Python: the kernels and what calls them."""
    sources = [(name, CSRC / "cpu" / f"{name}.cpp", "-O3") for name in ("moments", "norm_act", "plan")]
    has = " ".join(f"-DSPARSEKERN_HAS_{isa.upper()}" for isa in known)
    sources.append(("dispatch", CSRC / "cpu" / "dispatch.cpp", f"-O2 {has}"))
    return sources + [kernel for isa in reversed(known) for kernel in kernel_sources(isa)]


def kernel_sources(isa: str) -> list[tuple[str, Path, str]]:
    """Object name, path and flags of all kernels of an instruction set: a file for each op and dtype."""
    flags = f"{KERNEL_FLAGS} {ISA_FLAGS[isa]} -DSPARSEKERN_ISA={isa}"
    folder = CSRC / "cpu" / "kernels"
    sources = [
        (f"{isa}_{op}_{dtype}", folder / f"{op}.cpp", f"{flags} -DSPARSEKERN_DTYPE={dtype}")
        for op in ("sgd", "adam", "norm", "external")
        for dtype in DTYPES
    ]
    return [*sources, (f"{isa}_finish", folder / "finish.cpp", flags)]


def cuda_ninja_text(target: Path, build: Path) -> str:
    """The build of the CUDA library, which is linked by nvcc and knows nothing of Python."""
    command = nvcc()
    assert command is not None
    targets = []
    for entry in cuda().targets:
        number = entry.removesuffix("+PTX")
        kinds = ("compute", "sm") if entry.endswith("+PTX") else ("sm",)
        targets += [f"-gencode arch=compute_{number},code={kind}_{number}" for kind in kinds]
    lines = [
        f"builddir = {escape(build)}",
        f"nvcc = {shlex.quote(command)}",
        "rule compile",
        f"  command = $nvcc {CUDA_FLAGS} {' '.join(targets)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $nvcc -cudart static -shared {' '.join(targets)} $in -o $out",
    ]
    sources = sorted(
        path.relative_to(ROOT) for path in (ROOT / CSRC / "cuda").iterdir() if path.suffix in (".cu", ".cpp")
    )
    for path in sources:
        lines.append(f"build {escape(build / path.stem)}.o: compile {escape(path)}")
    objects = " ".join(f"{escape(build / path.stem)}.o" for path in sources)
    lines += [f"build {escape(target)}: link {objects}", f"default {escape(target)}", ""]
    return "\n".join(lines)


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def jobs() -> list[str]:
    """Ninja's option for MAX_JOBS."""
    stated = os.environ.get("MAX_JOBS", "")
    if not stated:
        return []
    if not stated.isdecimal() or int(stated) < 1:
        raise SystemExit(f"MAX_JOBS: got {stated!r}, expected a positive number")
    return ["-j", stated]


class NinjaBuild(build_ext):
    """``build_ext`` that leaves the compiling to ninja: in parallel, and again only what has changed."""

    def build_extensions(self) -> None:
        # An earlier build may have left what this one leaves out, and it would go into the wheel.
        Path(self.get_ext_fullpath(CUDA.name)).unlink(missing_ok=True)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext is not CUDA:
            if self.ninja("native", ninja_text, target) != 0:
                raise SystemExit(
                    "sparsekern: the native kernels did not compile (see above). With SPARSEKERN_NO_NATIVE=1 "
                    "the package is installed without them."
                )
        elif self.ninja("cuda", cuda_ninja_text, target) != 0:
            raise CompileError("sparsekern: the CUDA kernels did not compile (see above)")

    def objects(self) -> Path:
        """Where compiled files are kept. An editable installation is given a folder that is removed after it,
        and everything would be compiled again for a wheel or for the next one."""
        if not self.editable_mode:
            return Path(self.build_temp).resolve()
        base = self.get_finalized_command("build").build_base
        return Path(base, f"temp.{self.plat_name}-{sys.implementation.cache_tag}").resolve()

    def ninja(self, name: str, text: Callable[[Path, Path], str], target: Path) -> int:
        """Exit status of a build in a folder of its own."""
        build = self.objects() / name
        build.mkdir(parents=True, exist_ok=True)
        if build.is_relative_to(ROOT):
            build = build.relative_to(ROOT)
        description = ROOT / build / "build.ninja"
        description.write_text(text(target, build))
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = "ninja"
        return subprocess.run([program, "-f", str(description), *jobs()], cwd=ROOT).returncode


def repository() -> str:
    """Address of the public repository, from the environment or the metadata of an sdist; else empty."""
    stated = os.environ.get("SPARSEKERN_REPOSITORY", "")
    if not stated and (ROOT / "PKG-INFO").is_file():
        headers = HeaderParser().parsestr((ROOT / "PKG-INFO").read_text(encoding="utf-8"))
        urls = dict(line.split(", ", 1) for line in headers.get_all("Project-URL", []))
        stated = urls.get("Repository", "")
    return stated.removesuffix("/")


def absolute_links(text: str, address: str) -> str:
    """Markdown whose links to files of the repository also work on a page outside of it.

    Args:
        text: with links such as `[text](docs/page.md)` and `![text](docs/picture.png)`.
        address: of the repository; empty leaves the text as it is.
    """
    if not address:
        return text
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{address}/raw/HEAD/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\g<1>{address}/blob/HEAD/", text)


def urls(address: str) -> dict[str, str]:
    if not address:
        print("sparsekern: SPARSEKERN_REPOSITORY is not set: the metadata hold no addresses", file=sys.stderr)
        return {}
    return {
        "Repository": address,
        "Issues": f"{address}/issues",
        "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
    }


@functools.cache
def cuda() -> CudaBuild:
    return cuda_build()


NATIVE = Extension("sparsekern.kernels.native._C", sources=[])
CUDA = Extension("sparsekern.kernels.native._cuda_kernels", sources=[])


def extensions() -> list[Extension]:
    """What is built here; what is not is said on the standard error stream."""
    reason = why_pure()
    if reason is not None:
        print(f"sparsekern: building without native kernels: {reason}", file=sys.stderr)
        return []
    if not cuda().targets:
        print(f"sparsekern: building without CUDA kernels: {cuda().reason}", file=sys.stderr)
        return [NATIVE]
    print(f"sparsekern: building CUDA kernels for {', '.join(cuda().targets)}", file=sys.stderr)
    # Where nobody asked for them, setuptools makes a warning of a failure and goes on.
    CUDA.optional = not cuda().asked
    return [NATIVE, CUDA]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": NinjaBuild},
        long_description=absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
        long_description_content_type="text/markdown",
        project_urls=urls(repository()),
    )
