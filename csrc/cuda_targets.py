"""Which GPUs the CUDA kernels are built for, and what a build for them lacks. setup.py reads it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

# For SPARSEKERN_CUDA=1: those of these that nvcc knows. PTX of the last serves GPUs that are newer.
CUDA_ARCHITECTURES = ("80", "90", "100")
OLDEST_ARCHITECTURE = 75
OLDEST_NVCC = (11, 8)
# Names that TORCH_CUDA_ARCH_LIST may hold (torch/utils/cpp_extension.py).
ARCHITECTURE_NAMES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


def nvcc() -> str | None:
    """The CUDA compiler, None when there is none."""
    for command in (os.environ.get("CUDACXX", ""), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(command) if command else None
        if found:
            return found
    return None


def output_of(*command: str) -> str:
    """What a program prints; empty when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else ""


def version_in(text: str, label: str) -> tuple[int, int] | None:
    """The version that stands behind ``label`` in a program's output."""
    found = re.search(rf"{label}\s*:?\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class CudaBuild:
    """Whether and for what the CUDA kernels are built.

    Attributes:
        targets: architectures, for example "90" or "90+PTX"; empty when nothing is built.
        reason: why nothing is built.
        asked: whether the environment asks for them: then a failure ends the installation.
    """

    targets: tuple[str, ...] = ()
    reason: str = ""
    asked: bool = False


def cuda_build() -> CudaBuild:
    """The CUDA build of this machine and environment.

    Raises:
        SystemExit: the environment asks for kernels that cannot be built here.
    """
    stated = os.environ.get("SPARSEKERN_CUDA", "")
    if stated not in ("", "0", "1"):
        raise SystemExit(f"SPARSEKERN_CUDA: got {stated!r}, expected 0 or 1")
    if stated == "0" or os.environ.get("SPARSEKERN_NO_CUDA") == "1":
        return CudaBuild(reason="SPARSEKERN_CUDA=0")
    variables = ("SPARSEKERN_CUDA_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST")
    name = next((name for name in variables if os.environ.get(name)), "")
    asked = stated == "1" or bool(name)
    targets = parse_architectures(name) if name else () if asked else visible_architectures()
    if not asked and not targets:
        return CudaBuild(reason="no GPU is visible (SPARSEKERN_CUDA=1 builds them all the same)")
    reason = why_no_cuda(asked)
    if reason:
        if asked:
            raise SystemExit(f"sparsekern: the CUDA kernels are asked for and cannot be built: {reason}")
        return CudaBuild(reason=reason)
    return CudaBuild(known_to_nvcc(targets, name), asked=asked)


def parse_architectures(name: str) -> tuple[str, ...]:
    """The architectures of an environment variable, as torch ("8.0;9.0+PTX") or nvcc ("80") writes them."""
    text = os.environ[name]
    for word, meaning in ARCHITECTURE_NAMES.items():
        text = re.sub(rf"\b{word}\b", meaning, text)
    found = []
    for entry in re.split(r"[;,\s]+", text.strip("; ,")):
        match = re.fullmatch(r"(\d{1,2})\.?(\d)([af]?)(\+PTX)?", entry)
        number = int(match[1] + match[2]) if match else 0
        if match is None or number < OLDEST_ARCHITECTURE:
            raise SystemExit(
                f"{name}: got {entry!r}, expected architectures from {OLDEST_ARCHITECTURE} on, "
                "for example '8.0;9.0+PTX'"
            )
        found.append(f"{number}{match[3]}{match[4] or ''}")
    return tuple(found)


def visible_architectures() -> tuple[str, ...]:
    """The architectures of the GPUs that this process sees."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return ()
    lines = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
    numbers = sorted({int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)})
    return tuple(str(number) for number in numbers if number >= OLDEST_ARCHITECTURE)


def why_no_cuda(asked: bool) -> str:
    """What is missing for a CUDA build; empty when nothing is.

    Args:
        asked: the kernels may be for another machine, so that the driver of this one does not matter.
    """
    if sys.platform != "linux":
        return f"they are not built on {sys.platform}"
    command = nvcc()
    if command is None:
        return "there is no nvcc: install the CUDA toolkit or set CUDACXX to its nvcc"
    version = version_in(output_of(command, "--version"), "release")
    if version is None:
        return f"{command} --version tells no release"
    if version < OLDEST_NVCC:
        return f"{command} is of CUDA {dotted(version)}, expected {dotted(OLDEST_NVCC)} or newer"
    driver = version_in(output_of("nvidia-smi"), "CUDA Version")
    if not asked and driver is not None and driver[0] < version[0]:
        return (
            f"the driver supports CUDA {dotted(driver)} and {command} is of CUDA {dotted(version)}: "
            f"install a driver for CUDA {version[0]} or set CUDACXX to an nvcc of CUDA {driver[0]}"
        )
    return ""


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def known_to_nvcc(targets: tuple[str, ...], name: str) -> tuple[str, ...]:
    """``targets``, or the default ones that nvcc knows.

    Args:
        targets: architectures; empty for the default.
        name: the environment variable that they come from; empty for those of visible GPUs.

    Raises:
        SystemExit: nvcc does not compile for one that the environment names.
    """
    command = nvcc()
    assert command is not None
    known = set(output_of(command, "--list-gpu-code").split())
    if not targets:
        default = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
        return (*default, f"{default[-1]}+PTX") if default else ()
    unknown = [target for target in targets if f"sm_{target.removesuffix('+PTX')}" not in known]
    if unknown and name:
        raise SystemExit(f"{name}: got {', '.join(unknown)}, which {command} does not compile for")
    # A visible GPU that is newer than nvcc runs the PTX of the newest architecture that nvcc knows.
    newest = max((int(code[3:]) for code in known if code[3:].isdigit()), default=0)
    return tuple(dict.fromkeys(f"{newest}+PTX" if target in unknown else target for target in targets))
