"""What setup.py builds: on machines with and without a GPU, nvcc, a recent driver and a recent compiler."""

from __future__ import annotations

import importlib.util
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
VARIABLES = (
    "SPARSEKERN_CUDA",
    "SPARSEKERN_NO_CUDA",
    "SPARSEKERN_CUDA_ARCHITECTURES",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_VISIBLE_DEVICES",
    "CUDACXX",
    "MAX_JOBS",
)
SMI = """
case "$1" in
  --query-gpu=compute_cap) printf '{caps}' ;;
  *) echo '| NVIDIA-SMI 570.00   Driver Version: 570.00   CUDA Version: {cuda}     |' ;;
esac
"""
NVCC = """
case "$1" in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_86\\nsm_90\\nsm_90a\\nsm_100\\n' ;;
esac
"""


class Machine:
    """A folder of programs that stand for those of a machine, before all others on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, program: str, script: str) -> str:
        path = self.folder / program
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A Linux machine without a GPU and with nvcc of CUDA 13."""
    if sys.platform != "linux":
        pytest.skip("CUDA kernels are built on Linux alone")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    machine = Machine(tmp_path)
    monkeypatch.setenv("CUDACXX", machine.has("nvcc", NVCC.format(release="13.0")))
    return machine


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"test_build_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


TARGETS = module(ROOT / "csrc" / "cuda_targets.py")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return module(ROOT / "setup.py")


def test_without_a_gpu_nothing_is_compiled_for_one(machine: Machine) -> None:
    build = TARGETS.cuda_build()
    assert build.targets == () and "no GPU is visible" in build.reason


def test_visible_gpus_are_compiled_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("nvidia-smi", SMI.format(caps="9.0\\n8.6\\n9.0\\n6.1\\n", cuda="13.0"))
    assert TARGETS.cuda_build() == TARGETS.CudaBuild(("86", "90"))
    machine.has("nvidia-smi", SMI.format(caps="12.0\\n", cuda="13.0"))
    assert TARGETS.cuda_build().targets == ("100+PTX",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert TARGETS.cuda_build().targets == ()


def test_asked_without_a_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKERN_CUDA", "1")
    assert TARGETS.cuda_build() == TARGETS.CudaBuild(("80", "90", "100", "100+PTX"), asked=True)
    monkeypatch.setenv("SPARSEKERN_CUDA", "0")
    assert TARGETS.cuda_build().targets == ()


@pytest.mark.parametrize(
    ("stated", "targets"),
    [
        ("8.0;9.0+PTX", ("80", "90+PTX")),
        ("80 90", ("80", "90")),
        ("Ampere, 9.0a", ("80", "86+PTX", "90a")),
        ("Hopper", ("90+PTX",)),
    ],
)
def test_stated_architectures(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, stated: str, targets: tuple[str, ...]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", stated)
    assert TARGETS.cuda_build() == TARGETS.CudaBuild(targets, asked=True)
    monkeypatch.setenv("SPARSEKERN_CUDA_ARCHITECTURES", "100")
    assert TARGETS.cuda_build().targets == ("100",)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SPARSEKERN_CUDA", "yes", "SPARSEKERN_CUDA: got 'yes', expected 0 or 1"),
        ("SPARSEKERN_CUDA_ARCHITECTURES", "8.0;fast", "SPARSEKERN_CUDA_ARCHITECTURES: got 'fast', expected"),
        ("TORCH_CUDA_ARCH_LIST", "6.1", "TORCH_CUDA_ARCH_LIST: got '6.1', expected architectures from 75 on"),
        ("TORCH_CUDA_ARCH_LIST", "12.0", "got 120, which .*nvcc does not compile for"),
    ],
)
def test_what_cannot_be_asked_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        TARGETS.cuda_build()


def test_what_is_missing_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("nvidia-smi", SMI.format(caps="9.0\\n", cuda="12.4"))
    reason = TARGETS.cuda_build().reason
    assert "the driver supports CUDA 12.4" in reason and "install a driver for CUDA 13" in reason
    machine.has("nvcc", NVCC.format(release="11.4"))
    assert "is of CUDA 11.4, expected 11.8 or newer" in TARGETS.cuda_build().reason
    monkeypatch.setenv("SPARSEKERN_CUDA", "1")
    with pytest.raises(SystemExit, match="asked for and cannot be built: .*expected 11.8"):
        TARGETS.cuda_build()


def test_a_compiler_that_does_not_know_an_instruction_set(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setup: ModuleType
) -> None:
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", machine.has("oldcxx", 'case "$*" in *x86-64-v4*) exit 1 ;; esac\n'))
    text = setup.ninja_text(Path("target.so"), Path("build"))
    assert "building without v4" in capsys.readouterr().err
    assert "-DSPARSEKERN_HAS_V3" in text and "V4" not in text and "v4_" not in text
    assert "v3_adam_float32.o" in text and "baseline_finish.o" in text


def test_the_number_of_compilers(monkeypatch: pytest.MonkeyPatch, setup: ModuleType) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert setup.jobs() == []
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == ["-j", "3"]
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(SystemExit, match="MAX_JOBS: got 'all', expected a positive number"):
        setup.jobs()
