"""The file of timings: any fault of it gives a warning, and measured values are never lost."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsekern.files import atomic
from sparsekern.files.cache import directory
from sparsekern.latency.cache import Cache

CPU = torch.device("cpu")


def name(folder: Path) -> Path:
    return Cache(folder, CPU).path


def text(**entries: object) -> bytes:
    document = {"format": "sparsekern.latency", "version": 1, "settings": {}, "seconds": {"a": 1.0}}
    return json.dumps(document | entries).encode()


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "links in a circle": lambda path: path.symlink_to(path),
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_bytes(b"[" * 200_000),
    "deep and closed": lambda path: path.write_bytes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a long number": lambda path: path.write_bytes(b'{"version": ' + b"9" * 10_000 + b"}"),
    "negative": lambda path: path.write_bytes(text(seconds={"a": -1.0})),
    "NaN": lambda path: path.write_bytes(text(seconds={"a": float("nan")})),
    "infinite": lambda path: path.write_bytes(text(seconds={"a": float("inf")})),
    "too large": lambda path: path.write_bytes(text(seconds={"a": 10**400})),
    "a text": lambda path: path.write_bytes(text(seconds={"a": "1.0"})),
    "True": lambda path: path.write_bytes(text(seconds={"a": True})),
    "a list": lambda path: path.write_bytes(text(seconds=[1.0])),
    "twice": lambda path: path.write_bytes(text().replace(b'"a": 1.0', b'"a": 1.0, "a": 2.0')),
    "UTF-16": lambda path: path.write_bytes(text().decode().encode("utf-16")[:-1]),
    "endless": lambda path: path.write_bytes(b" " * (33 << 20)),
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_file_of_timings_is_left_with_one_warning(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    path = name(tmp_path)
    damage(path)
    with pytest.warns(UserWarning) as caught:
        cache = Cache(tmp_path, CPU)
        cache.seconds["b"] = 2.0
        cache.save()
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert cache.seconds == {"b": 2.0}
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_file_that_was_damaged_is_replaced(tmp_path: Path) -> None:
    name(tmp_path).write_bytes(b"\xff")
    with pytest.warns(UserWarning, match="not a file of latencies"):
        cache = Cache(tmp_path, CPU)
    cache.seconds["a"] = 1.0
    cache.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Cache(tmp_path, CPU).seconds == {"a": 1.0}


@pytest.mark.parametrize("where", ["file", "file/below", "loop", "n" * 300, "/proc/nowhere", "/dev/full/x"])
def test_a_folder_that_cannot_be_written_is_left_with_one_warning(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.warns(UserWarning, match="latency-") as caught:
        cache = Cache(tmp_path / where, CPU)
        cache.seconds["a"] = 1.0
        cache.save()
        cache.save()
    assert len(caught) == 1
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_is_left_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, CPU)
    cache.seconds["a"] = 1.0
    cache.save()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_flush", full)
    cache.seconds["b"] = 2.0
    with pytest.warns(UserWarning, match=r"cannot be written \(cache: .*No space left"):
        cache.save()
    assert [path.name for path in tmp_path.iterdir()] == [cache.path.name]
    assert Cache(tmp_path, CPU).seconds == {"a": 1.0}


def test_writers_at_the_same_time_leave_a_whole_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        cache = Cache(tmp_path, CPU)
        for step in range(5):
            cache.seconds[f"{number}.{step}"] = 1.0
            cache.save()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # The last writer has at least its own.
        assert len(Cache(tmp_path, CPU).seconds) >= 5
    assert len(list(tmp_path.iterdir())) == 1


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "SPARSEKERN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert directory().parent == tmp_path


@pytest.mark.parametrize("given", [3, b"folder", ["folder"], "a\0b", "\udcff\ud800"])
def test_what_is_no_name_of_a_folder_is_refused(given: object) -> None:
    with pytest.raises((TypeError, ValueError), match="^cache: got "):
        directory(given)  # type: ignore[arg-type]
