"""Loading the CUDA library, and the message if it does not work."""

from __future__ import annotations

import importlib.machinery
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from sparsekern.kernels import backends, native
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.options import HYPER


def test_it_says_why_it_does_not_work() -> None:
    reason = cuda_library.why_not()
    if torch.version.cuda is None or not torch.cuda.is_available():
        assert reason
        if native.load() is not None and cuda_library.load() is not None:
            assert "never run on a GPU" in reason
    if cuda_library.load() is None:
        assert cuda_library.reason is not None and "CUDA kernels were not built" in cuda_library.reason


@pytest.mark.parametrize("index", [0, 3])
def test_only_the_asked_gpu_is_touched(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context takes hundreds of MB, so none is made on the current GPU for tensors on another one."""
    tried: list[int] = []
    library = SimpleNamespace(sparsekern_cuda_try=lambda device: tried.append(device) or 0)
    monkeypatch.setattr(cuda_library, "load", lambda: library)
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(HYPER=HYPER))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for the current GPU"))
    monkeypatch.setenv("SPARSEKERN_SELFCHECK", "0")
    monkeypatch.delenv("SPARSEKERN_BACKEND", raising=False)
    backends.reset()
    try:
        assert backends.choose(torch.device("cuda", index)).__name__.endswith("backends.cuda")
    finally:
        backends.reset()
    assert tried == [index]


def test_a_missing_library_and_one_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(OSError):
        cuda_library.bind(tmp_path / "broken.so")
    monkeypatch.setattr(cuda_library, "__file__", str(tmp_path / "cuda_library.py"))
    monkeypatch.setattr(cuda_library, "reason", None)
    assert cuda_library.load.__wrapped__() is None
    assert "were not built at installation" in str(cuda_library.reason)


def test_a_library_without_a_symbol_is_a_backend_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older build lacks a newly added symbol: the message tells the user to build it again."""
    stale = tmp_path / f"_cuda_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    # Any other library that loads lacks the symbols.
    stale.symlink_to(numpy.linalg._umath_linalg.__file__)
    monkeypatch.setattr(cuda_library, "__file__", str(tmp_path / "cuda_library.py"))
    monkeypatch.setattr(cuda_library, "reason", None)
    monkeypatch.setattr(cuda_library, "load", cuda_library.load.__wrapped__)
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(HYPER=HYPER))
    (reason,) = (what for name, works, what in backends.available() if name == "cuda" and not works)
    assert reason.startswith(f"{stale}: got a library of another version (")
    assert "sparsekern_cuda_sizes" in reason and "python setup.py build_ext --inplace" in reason


def test_a_library_with_other_structs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cuda_library.load()
    if library is None:
        pytest.skip("the CUDA kernels were not built")
    monkeypatch.setattr(cuda_library, "_STRUCTS", (*cuda_library._STRUCTS[:-1], cuda_library.Cut))
    with pytest.raises(
        RuntimeError, match="got a library of another version (.* bytes, not .*); to build it"
    ):
        cuda_library.bind(Path(library._name))
