"""All files are written by one function: complete or absent, with the old mode, and errors name the file."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import resource
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern.files import atomic
from sparsekern.files.atomic import load_plain, opened, parse_json, read_plain, replacing, save_plain, target
from sparsekern.integrations.trainers import from_text, to_text
from sparsekern.recipes.checkpoint import load_backbone, save_checkpoint


def write(path: str | os.PathLike[str], text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limit the size of files, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("old", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(old: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(old)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600  # nobody reads it before it is as private as it was
        temporary.write_text("new")
    assert mode(path) == old
    assert path.read_text() == "new"


def test_a_new_file_has_what_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a.txt")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.txt") == 0o640


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="gives a file away")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    os.chown(path, 1234, 4321)
    path.chmod(0o4755)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (1234, 4321, 0o4755)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    write(path)
    assert mode(path) == 0o755  # it would run as somebody else


def test_links_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "link").symlink_to("a.txt")
    (tmp_path / "free").symlink_to("b.txt")
    os.link(tmp_path / "a.txt", tmp_path / "hard")
    write(tmp_path / "link")
    write(tmp_path / "free")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "free").is_symlink()
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text() == "new"
    assert (tmp_path / "hard").read_text() == "old"


@pytest.mark.parametrize(
    "name", ["ü" * 127, "n" * 250 + ".json", "a." + "x" * 253, "文" * 83 + ".png", ".pt"]
)
def test_a_name_as_long_as_a_name_can_be(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# What cannot be written to, by what has to be there before.
UNWRITABLE: dict[str, tuple[str, type[Exception], str]] = {
    "a folder": ("folder", IsADirectoryError, "is a directory"),
    "links in a circle": ("loop", OSError, "symbolic links"),
    "a link below a circle": ("loop/a.txt", OSError, "symbolic links"),
    "a pipe": ("pipe", OSError, "is not a regular file"),
    "a link to a device": ("device", OSError, "is not a regular file"),
    "a full device": ("/dev/full", OSError, "is not a regular file"),
    "no folder": ("nowhere/a.txt", FileNotFoundError, "is not a directory"),
    "a file for a folder": ("file/a.txt", FileNotFoundError, "is not a directory"),
    "a name too long": ("ü" * 128, OSError, "too long"),
    "nothing": ("", OSError, "is a directory"),
    "a zero": ("a\0b", ValueError, "expected characters"),
    "half a pair": ("\ud800", ValueError, "expected characters"),
}
WRITERS: dict[str, Callable[[Path], object]] = {
    "replacing": write,
    "save": lambda path: sparsekern.save(nn.Linear(2, 2), path),
    "recipes": lambda path: save_checkpoint(path, {"a": torch.ones(2)}),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("name", "kind", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_is_named(
    name: str, kind: type[Exception], message: str, writer: Callable[[object], object], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "device").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(kind, match=f"(?i)^path: .*{message}"):
        writer(os.path.join(tmp_path, name) if name else str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("given", [None, 3, b"a.txt", ["a.txt"]])
def test_what_is_no_name_is_refused(given: object) -> None:
    for use in (target, read_plain, lambda path: sparsekern.load(nn.Linear(2, 2), path)):
        with pytest.raises(TypeError, match="^path: got .*, expected the name of a file"):
            use(given)  # type: ignore[operator]


BIG = {"a": torch.zeros(100_000)}
FILLING: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write(path, "x" * 400_000),
    "save": lambda path: sparsekern.save(nn.Linear(400, 400), path),
    "recipes": lambda path: save_checkpoint(path, BIG),
}


@pytest.mark.parametrize("limit", [0, 700, 100_000])
@pytest.mark.parametrize("writer", FILLING.values(), ids=FILLING)
def test_a_full_disk_is_named_and_leaves_the_old_file(
    writer: Callable[[Path], object], limit: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    path.write_text("old")
    with limited(limit), pytest.raises(OSError, match=r"path: cannot write .*a.pt': .*too large"):
        writer(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_flush", full)
    with pytest.raises(OSError, match="path: cannot write .*a.txt': No space left") as caught:
        write(tmp_path / "a.txt")
    assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(FileNotFoundError, match="path: cannot write .*folder/a.txt': No such file"),
        replacing(tmp_path / "folder" / "a.txt") as temporary,
    ):
        temporary.unlink()
        temporary.parent.rmdir()
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() == 0, reason="everything is permitted")
def test_what_is_protected_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="path: cannot write .*a.txt': Permission denied"):
        write(path)
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="path: cannot write .*b.txt': Permission denied"):
        write(tmp_path / "b.txt")
    tmp_path.chmod(0o755)


def test_reading_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "nothing", ".", "n" * 300, "/dev/zero"):
        for read in (read_plain, lambda path: sparsekern.load(nn.Linear(2, 2), path)):
            with pytest.raises(OSError, match="^path: "):
                read(tmp_path / name)
        with pytest.raises(OSError, match="^--plan: "), opened(tmp_path / name, "--plan"):
            pass


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a": 1, "a": 2}', "NaN", "-Infinity", "9" * 10**4, "", b"\xff", 3]
)
def test_json_that_nobody_wrote_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        parse_json(text)  # type: ignore[arg-type]


def test_the_old_format_has_no_checksums(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="^path: .*weights.pth.*no archive of torch.save"):
        read_plain(path)
    with pytest.warns(UserWarning, match="--backbone: .*weights.pth.*checksums"):
        assert torch.equal(load_backbone(path)["a"], torch.ones(3))
    named = path.rename(tmp_path / f"weights-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    assert torch.equal(load_backbone(named)["a"], torch.ones(3))


def test_an_archive_asks_for_no_more_than_it_is_long(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_plain(BIG, path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match="no plain stored one"):
        load_plain(packed)


def test_text_of_a_trainer(tmp_path: Path) -> None:
    text = to_text({"a": torch.ones(2)})
    assert torch.equal(from_text(text)["a"], torch.ones(2))
    for damaged in (text[: len(text) // 2], "A" + text, text.replace("A", "B"), "", "ä"):
        with pytest.raises(ValueError, match="^state: "):
            from_text(damaged)
