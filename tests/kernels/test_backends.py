"""Which backend is chosen, and the warning when a faster one does not work."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch

from sparsekern.kernels import backends, native
from sparsekern.kernels import checks as _checks
from sparsekern.kernels.backends import reference
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.ops import channel_moments_
from sparsekern.kernels.rows import RowTable

CPU = torch.device("cpu")


def test_available_names_all_and_says_what_they_are() -> None:
    found = {name: (works, what) for name, works, what in backends.available()}
    assert set(found) == {"reference", "cpu", "cuda", "triton"}
    assert found["reference"][0]
    assert found["cpu"][0] == (native.load() is not None)
    assert all(what for _, what in found.values())


def test_the_native_backend_is_taken_where_it_works(force_backend: Callable[[str], None]) -> None:
    force_backend("")
    name = "cpu" if native.load() is not None else "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert backends.choose(CPU).__name__ == f"sparsekern.kernels.backends.{name}"
        assert backends.choose(torch.device("meta")) is reference


def test_without_native_module_one_warning_says_why(
    force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_backend("")
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "reason", "there is no compiler")
    with pytest.warns(UserWarning, match="without its cpu backend: there is no compiler") as seen:
        assert backends.choose(CPU) is reference
        assert backends.choose(CPU) is reference
    assert len(seen) == 1
    assert ("cpu", False, "there is no compiler") in backends.available()


def test_triton_is_taken_where_cuda_was_not_compiled(
    force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    gpu = torch.device("cuda")
    force_backend("")
    monkeypatch.setenv("SPARSEKERN_SELFCHECK", "0")
    monkeypatch.setattr(cuda_library, "why_not", lambda *_: "it was not compiled")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="without its cuda backend: it was not compiled") as seen:
        assert backends.choose(gpu).__name__ == "sparsekern.kernels.backends.triton"
    assert len(seen) == 1
    (what,) = (what for name, _, what in backends.available() if name == "triton")
    assert "tensors on GPUs" in what and "never run on a GPU" in what
    monkeypatch.setattr(cuda_library, "why_not", lambda *_: None)
    backends.reset()
    assert backends.choose(gpu).__name__ == "sparsekern.kernels.backends.cuda"


def test_why_triton_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert backends.why_not("triton", "cpu") == "it takes tensors on cuda, not on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.why_not("triton", "cuda") == "torch finds no CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.why_not("triton", "cuda") == "it takes tensors on cpu, not on cuda"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backends.why_not("triton", "cpu") == "triton is not installed"


def test_a_triton_that_cannot_be_imported_is_one_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "sparsekern.kernels.backends.triton", raising=False)
    monkeypatch.setitem(sys.modules, "sparsekern.kernels.backends.triton.step", None)
    reason = backends.why_not("triton", "cpu")
    assert reason is not None and reason.startswith("triton cannot be used (ModuleNotFoundError")


def test_forced(force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    force_backend("reference")
    assert backends.choose(CPU) is reference
    force_backend("tpu")
    with pytest.raises(ValueError, match="SPARSEKERN_BACKEND: got 'tpu', expected one of reference"):
        backends.choose(CPU)
    force_backend("cpu")
    with pytest.raises(RuntimeError, match="SPARSEKERN_BACKEND: got 'cpu' for tensors on meta"):
        backends.choose(torch.device("meta"))
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "reason", "there is no compiler")
    with pytest.raises(RuntimeError, match="there is no compiler"):
        backends.choose(CPU)


@pytest.mark.filterwarnings("ignore:sparsekern runs without")
def test_tensors_on_a_gpu_have_a_backend_that_works(
    force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernels, or else the reference and warnings that say why."""
    device = torch.device("cuda")
    force_backend("")
    monkeypatch.setenv("SPARSEKERN_SELFCHECK", "0")
    monkeypatch.setattr(cuda_library, "why_not", lambda *_: "the driver is too old")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="without its cuda backend: the driver is too old") as seen:
        assert backends.choose(device) is reference
        assert backends.choose(device) is reference
    assert ["triton is not installed" in str(warning.message) for warning in seen] == [False, True]
    assert ("cuda", False, "the driver is too old") in backends.available()
    force_backend("cuda")
    with pytest.raises(RuntimeError, match="got 'cuda' for tensors on cuda.*the driver is too old"):
        backends.choose(device)
    with pytest.raises(RuntimeError, match="it takes tensors on cuda, not on cpu"):
        backends.choose(CPU)
    monkeypatch.setattr(cuda_library, "why_not", lambda *_: None)
    backends.reset()
    assert backends.choose(device).__name__ == "sparsekern.kernels.backends.cuda"
    (what,) = (what for name, _, what in backends.available() if name == "cuda")
    assert "never run on a GPU" in what


def test_no_native_by_environment() -> None:
    """A fresh process without native code steps with the reference and warns once."""
    program = """
import warnings, torch
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.options import SGD, SgdOptions
param = torch.nn.Parameter(torch.ones(3))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        _ops.step_(SGD, ([param], [torch.ones(3)], []), SgdOptions(lr=0.5), None)
assert param.tolist() == [0.0, 0.0, 0.0], param
assert ["SPARSEKERN_NO_NATIVE=1 is set" in str(w.message) for w in seen] == [True], seen
"""
    environment = os.environ | {"SPARSEKERN_NO_NATIVE": "1"}
    environment.pop("SPARSEKERN_BACKEND", None)
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_backends_have_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ("reference", "cpu", "cuda", "triton")
    if importlib.util.find_spec("triton") is None:
        names = names[:-1]
    modules = [importlib.import_module(f"sparsekern.kernels.backends.{name}") for name in names]
    public = [{name for name in vars(m) if not name.startswith("_")} - {"step", "norm_act"} for m in modules]
    for module, found in zip(modules, public, strict=True):
        assert public[0] <= found, module.__name__


def test_native_code_checks_the_channel_arrays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking them in Python takes longer than the step of a small network."""
    if backends.why_not("cpu", "cpu") is not None:
        pytest.skip("needs the compiled core")
    monkeypatch.setattr(_checks, "channels", lambda table: pytest.fail("checked in Python"))
    weight = torch.ones(2, 3)
    table = RowTable([(weight, 0)], [[0], [1]])
    channel_moments_(table)
