"""Builds the native kernels with ninja: for the CPU where there is a compiler, for CUDA where there is nvcc.

Everything else about the package stands in pyproject.toml, except for what depends on the address of the
repository. torch is not needed: the kernels take addresses.

Environment:
    SPARSEKERN_REPOSITORY=https://HOST/OWNER/NAME: the public repository, for the links of the package's page.
    SPARSEKERN_NO_NATIVE=1: build no native code; the package then runs on its reference backend.
    SPARSEKERN_NO_CUDA=1: build no CUDA kernels.
    SPARSEKERN_SANITIZE=1: build the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer.
    CXX, CUDACXX: the compilers.
"""

from __future__ import annotations

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
# Relative to ROOT, where ninja runs, so that an unpacked sdist can use the objects of the tree it came from.
CSRC = Path("csrc")

# No fused multiply-add and no reassociation: all instruction sets compute the same bits. The two relaxations
# change no result; they let the compiler vectorise square roots and selections.
KERNEL_FLAGS = "-O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti"
COMMON_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -DNDEBUG -Wall -Wextra"
# Any finding ends the process. Optimisation is lower, because instrumented code takes minutes to optimise.
SANITIZE_FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# The same arithmetic on a GPU: by default nvcc contracts, too. Kernels are compiled for each of these
# architectures that nvcc supports, and the last one also as PTX, for later architectures.
CUDA_FLAGS = (
    "-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false -DNDEBUG -Werror all-warnings "
    "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -cudart static"
)
CUDA_ARCHITECTURES = (80, 90, 100)
ISA_FLAGS = {"baseline": "", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4 -mprefer-vector-width=512"}


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


def nvcc() -> str | None:
    """The command of the CUDA compiler; None if there is none."""
    for command in (os.environ.get("CUDACXX", ""), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(command) if command else None
        if found:
            return found
    return None


def why_no_cuda() -> str | None:
    """The reason why no CUDA kernels are built here; None if they are built."""
    if os.environ.get("SPARSEKERN_NO_CUDA") == "1":
        return "SPARSEKERN_NO_CUDA=1"
    if sys.platform != "linux":
        return f"they are not built on {sys.platform}"
    command = nvcc()
    if command is None:
        return "there is no nvcc"
    return None if architectures(command) else f"{command} compiles for none of {CUDA_ARCHITECTURES}"


def architectures(command: str) -> list[int]:
    """The architectures of CUDA_ARCHITECTURES that this nvcc supports."""
    result = subprocess.run([command, "--list-gpu-code"], capture_output=True, text=True)
    known = set(result.stdout.split())
    return [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


def ninja_text(target: Path, build: Path) -> str:
    """The whole build as a ninja file; the flags of an instruction set go to its own file alone."""
    import pybind11

    command = compiler()
    assert command is not None
    includes = f"-isystem {pybind11.get_include()} -isystem {python_include()}"
    with_python = ("module", "norm_module", "runtime", "sources")
    sources = [(name, CSRC / f"{name}.cpp", f"-O2 {includes}") for name in with_python]
    sources += [
        (name, CSRC / "cpu" / f"{name}.cpp", "-O3") for name in ("dispatch", "moments", "norm_act", "plan")
    ]
    for isa in isas():
        path = CSRC / "cpu" / f"kernels_{isa}.cpp"
        sources.append((path.stem, path, f"{KERNEL_FLAGS} {ISA_FLAGS[isa]}"))
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


def cuda_ninja_text(target: Path, build: Path) -> str:
    """The build of the CUDA library, which is linked by nvcc and knows nothing of Python."""
    command = nvcc()
    assert command is not None
    numbers = architectures(command)
    targets = [f"-gencode arch=compute_{n},code=sm_{n}" for n in numbers]
    targets.append(f"-gencode arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
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
            # The extension is optional: setuptools makes a warning of this, and goes on.
            raise CompileError("sparsekern: the CUDA kernels did not compile (see above) and are left out")

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
        return subprocess.run([program, "-f", str(description)], cwd=ROOT).returncode


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


NATIVE = Extension("sparsekern.kernels.native._C", sources=[])
CUDA = Extension("sparsekern.kernels.native._cuda_kernels", sources=[], optional=True)
extensions = []
reason = why_pure()
if reason is None:
    extensions.append(NATIVE)
    reason_of_cuda = why_no_cuda()
    if reason_of_cuda is None:
        extensions.append(CUDA)
    else:
        print(f"sparsekern: building without CUDA kernels: {reason_of_cuda}", file=sys.stderr)
else:
    print(f"sparsekern: building without native kernels: {reason}", file=sys.stderr)
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
    long_description=absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
    long_description_content_type="text/markdown",
    project_urls=urls(repository()),
)
