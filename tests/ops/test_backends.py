"""Which backend is taken, and what is said when it is not the one hoped for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch

from sparsekern import _cuda, _native, backends
from sparsekern.backends import reference

CPU = torch.device("cpu")


def test_available_names_all_and_says_what_they_are() -> None:
    found = {name: (works, what) for name, works, what in backends.available()}
    assert set(found) == {"reference", "cpu", "cuda"}
    assert found["reference"][0]
    assert found["cpu"][0] == (_native.load() is not None)
    assert all(what for _, what in found.values())


def test_the_native_backend_is_taken_where_it_works(force_backend: Callable[[str], None]) -> None:
    force_backend("")
    name = "cpu" if _native.load() is not None else "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert backends.choose(CPU).__name__ == f"sparsekern.backends.{name}"
        assert backends.choose(torch.device("meta")) is reference


def test_without_native_module_one_warning_says_why(
    force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    force_backend("")
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setattr(_native, "reason", "there is no compiler")
    with pytest.warns(UserWarning, match="without its cpu backend: there is no compiler") as seen:
        assert backends.choose(CPU) is reference
        assert backends.choose(CPU) is reference
    assert len(seen) == 1
    assert ("cpu", False, "there is no compiler") in backends.available()


def test_normalisations_go_to_triton_where_cuda_was_not_compiled(
    force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "why_not", lambda: "it was not compiled")
    gpu = torch.device("cuda")
    force_backend("reference")
    assert backends.choose_norm(gpu) is reference
    force_backend("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="without its cuda backend"):
        assert backends.choose_norm(gpu) is reference
    backends.reset()
    monkeypatch.undo()
    monkeypatch.setattr(_cuda, "why_not", lambda: "it was not compiled")
    pytest.importorskip("triton")
    with pytest.warns(UserWarning, match="without its cuda backend"):
        assert backends.choose_norm(gpu).__name__ == "sparsekern.backends.triton.norm_act"
    assert backends.choose_norm(CPU) is backends.choose(CPU)


def test_forced(force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    force_backend("reference")
    assert backends.choose(CPU) is reference
    force_backend("tpu")
    with pytest.raises(ValueError, match="SPARSEKERN_BACKEND: got 'tpu', expected one of reference"):
        backends.choose(CPU)
    force_backend("cpu")
    with pytest.raises(RuntimeError, match="SPARSEKERN_BACKEND: got 'cpu' for tensors on meta"):
        backends.choose(torch.device("meta"))
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setattr(_native, "reason", "there is no compiler")
    with pytest.raises(RuntimeError, match="there is no compiler"):
        backends.choose(CPU)


def test_tensors_on_a_gpu_have_a_backend_that_works(
    force_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernels, or the reference and a warning that says why."""
    device = torch.device("cuda")
    force_backend("")
    monkeypatch.setattr(_cuda, "why_not", lambda: "the driver is too old")
    with pytest.warns(UserWarning, match="without its cuda backend: the driver is too old") as seen:
        assert backends.choose(device) is reference
        assert backends.choose(device) is reference
    assert len(seen) == 1
    assert ("cuda", False, "the driver is too old") in backends.available()
    force_backend("cuda")
    with pytest.raises(RuntimeError, match="got 'cuda' for tensors on cuda.*the driver is too old"):
        backends.choose(device)
    with pytest.raises(RuntimeError, match="it takes tensors on cuda, not on cpu"):
        backends.choose(CPU)
    monkeypatch.setattr(_cuda, "why_not", lambda: None)
    backends.reset()
    assert backends.choose(device).__name__ == "sparsekern.backends.cuda"
    (what,) = (what for name, _, what in backends.available() if name == "cuda")
    assert "never run on a GPU" in what


def test_no_native_by_environment() -> None:
    """In a process of its own: the package steps, on the reference, and says so once."""
    program = """
import warnings, torch
from sparsekern import _ops
param = torch.nn.Parameter(torch.ones(3))
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        _ops.sgd_step_([param], [torch.ones(3)], [], lr=0.5, momentum=0.0, dampening=0.0,
                       weight_decay=0.0, nesterov=False, maximize=False, first=False, rows=None)
assert param.tolist() == [0.0, 0.0, 0.0], param
assert ["SPARSEKERN_NO_NATIVE=1 is set" in str(w.message) for w in seen] == [True], seen
"""
    environment = os.environ | {"SPARSEKERN_NO_NATIVE": "1"}
    environment.pop("SPARSEKERN_BACKEND", None)
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
