"""A damaged checkpoint raises one ValueError that names the file, or loads bit for bit as saved."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import train
from prune.test_checkpoint import parts
from prune.test_tampered import everything
from torch import Tensor

from sparsekern.prune.save import checkpoint

# More with SPARSEKERN_FLIPS=10000.
FLIPS = int(os.environ.get("SPARSEKERN_FLIPS", "200"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = parts()
    train(*run[:2], range(9))
    path = tmp_path_factory.mktemp("damage") / "checkpoint.pt"
    run[2].save_checkpoint(path, epoch=3)
    return path


def flipped(data: bytes, where: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[where] ^= 1 << bit
    return bytes(changed)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_a_flipped_bit_is_found_or_harmless(written: Path, tmp_path: Path) -> None:
    data, expected = written.read_bytes(), checkpoint.read(written)
    source = np.random.default_rng(0)
    path = tmp_path / "flipped.pt"
    found = 0
    # Half of them are outside of the checksums: in headers, the directory and the gaps.
    start = data.index(b"PK\x01\x02")
    for number in range(FLIPS):
        where = int(source.integers(start if number % 4 == 0 else 0, len(data)))
        path.write_bytes(flipped(data, where, int(source.integers(8))))
        try:
            assert same(checkpoint.read(path), expected), where
        except ValueError as error:
            assert "flipped.pt" in str(error), (where, error)
            found += 1
    assert found > FLIPS // 3


def test_a_truncated_file_is_found_wherever_it_ends(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    path = tmp_path / "short.pt"
    for end in np.random.default_rng(1).integers(0, len(data) - 1, 20):
        path.write_bytes(data[: int(end)])
        with pytest.raises(ValueError, match=r"^path: .*short.pt"):
            checkpoint.read(path)


def repacked(data: bytes, pickled: Callable[[bytes], bytes]) -> bytes:
    """The archive with another pickle and valid checksums: a deliberate forgery."""
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(forged, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, pickled(content) if entry.filename.endswith("data.pkl") else content)
    return forged.getvalue()


def test_a_forged_pickle_is_refused_or_loaded_whole(written: Path, tmp_path: Path) -> None:
    data = written.read_bytes()
    source = np.random.default_rng(2)
    path = tmp_path / "forged.pt"
    run = parts(seed=3)
    path.write_bytes(repacked(data, bytes))
    assert same(checkpoint.read(path), checkpoint.read(written))
    loaded = 0

    def changed(text: bytes) -> bytes:
        own = bytearray(text)
        for _ in range(int(source.integers(1, 4))):
            own[int(source.integers(len(own)))] = int(source.integers(256))
        return bytes(own)

    for _ in range(FLIPS // 10):
        path.write_bytes(repacked(data, changed))
        before = everything(run)
        try:
            run[2].load_checkpoint(path)
        except ValueError as error:
            assert type(error) is ValueError
            assert everything(run) == before
        else:
            loaded += 1
            run = parts(seed=3)
    assert loaded < FLIPS // 10
