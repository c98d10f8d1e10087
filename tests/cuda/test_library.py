"""Loading the CUDA library, and what is said where it does not work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsekern import _cuda, _native


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
    assert _cuda.load.__wrapped__() is None
    assert "were not built at installation" in str(_cuda.reason)
