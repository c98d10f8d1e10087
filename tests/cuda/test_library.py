"""Loading the CUDA library, and what is said where it does not work."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import numpy
import pytest
import torch

from sparsekern import _cuda, _native, backends


def test_it_says_why_it_does_not_work() -> None:
    reason = _cuda.why_not()
    if torch.version.cuda is None or not torch.cuda.is_available():
        assert reason
        if _native.load() is not None and _cuda.load() is not None:
            assert "never run on a GPU" in reason
    if _cuda.load() is None:
        assert _cuda.reason is not None and "CUDA kernels were not built" in _cuda.reason


def test_a_missing_library_and_one_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(OSError):
        _cuda.bind(tmp_path / "broken.so")
    monkeypatch.setattr(_cuda, "__file__", str(tmp_path / "_cuda.py"))
    monkeypatch.setattr(_cuda, "reason", None)
    assert _cuda.load.__wrapped__() is None
    assert "were not built at installation" in str(_cuda.reason)


def test_a_library_without_a_symbol_is_a_backend_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was built in this tree before the symbol was added: the user is told to build it again."""
    stale = tmp_path / f"_cuda_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    # Any library that loads has none of ours.
    stale.symlink_to(numpy.linalg._umath_linalg.__file__)
    monkeypatch.setattr(_cuda, "__file__", str(tmp_path / "_cuda.py"))
    monkeypatch.setattr(_cuda, "reason", None)
    monkeypatch.setattr(_cuda, "load", _cuda.load.__wrapped__)
    monkeypatch.setattr(_native, "load", lambda: object())
    (reason,) = (what for name, works, what in backends.available() if name == "cuda" and not works)
    assert reason.startswith(f"{stale}: got a library of another version (")
    assert "sparsekern_cuda_sizes" in reason and "python setup.py build_ext --inplace" in reason


def test_a_library_with_other_structs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _cuda.load()
    if library is None:
        pytest.skip("the CUDA kernels were not built")
    monkeypatch.setattr(_cuda, "_STRUCTS", (*_cuda._STRUCTS[:-1], _cuda.Cut))
    with pytest.raises(
        RuntimeError, match="got a library of another version (.* bytes, not .*); to build it"
    ):
        _cuda.bind(Path(library._name))
