"""Files that are complete or absent, and hold no code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

AnyPath = str | os.PathLike[str]

# Writers choose their format by the suffix; a longer one names no format, but may not fit beside a prefix.
_LONGEST_SUFFIX = 16
_CHUNK = 1 << 20
_IS_DIRECTORY = 0x10  # of the attributes that MS-DOS has


@contextmanager
def replacing(path: AnyPath, argument: str = "path") -> Iterator[Path]:
    """An empty file beside ``path`` that takes its place, flushed to disk, once the block has written it.

    The file keeps the suffix of ``path``, because writers choose their format by it. If the block fails, the
    file is removed; if the process dies in it, the old file stays as it was. A symbolic link stays, and the
    file that it points to is replaced. The new file has the mode of the old one, its owner where the system
    permits, else what the umask leaves. Other hard links to the old file keep the old content, and extended
    attributes are not copied.

    Args:
        path: the file to write.
        argument: what messages call ``path``.

    Yields:
        The name to write to.

    Raises:
        OSError: ``path`` cannot be written, or the disk is full; names ``path``. The old file is whole.
        TypeError, ValueError: ``path`` is no name of a file.
    """
    destination = target(path, argument)
    with _naming(path, "write", argument):
        old = destination.stat() if destination.exists() else None
        temporary = _make_beside(destination, private=old is not None)
    try:
        mode = stat.S_IMODE((old or temporary.stat()).st_mode)
        yield temporary
        if old is not None and not _give(temporary, old):
            mode &= 0o777  # no bits that would run it as somebody else
        # After the owner, whose change clears bits of the mode; and whatever mode the writer prefers.
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, destination)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _named(error, path, "write", argument) from error
        raise
    # The new name is on the disk only when the directory is; not every system can do that.
    with suppress(OSError):
        _flush(destination.parent)


def target(path: AnyPath, argument: str = "path") -> Path:
    """Where a file of that name is written: through symbolic links, so that the link stays.

    Raises:
        OSError: it is a directory, a device or write-protected, its name is too long, its links go round in
            a circle, or its directory does not exist; names ``path``.
        TypeError, ValueError: ``path`` is no name of a file.
    """
    check_name(path, argument)
    name = os.fspath(path)
    with _naming(path, "write", argument):
        found = Path(os.path.realpath(path))
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            # The name is free, or the last of its links points to one that is.
            if not found.parent.is_dir():
                raise FileNotFoundError(f"{str(found.parent)!r} is not a directory") from None
            return found
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{argument}: {name!r} is a directory, expected a file name")
        if not stat.S_ISREG(mode):
            # Replacing a device or a pipe would take it away from the system.
            raise OSError(f"{argument}: {name!r} is not a regular file")
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return found


@contextmanager
def opened(path: AnyPath, argument: str = "path") -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes.

    Raises:
        OSError: the file cannot be read, or is a directory, device or pipe; names ``path``.
        TypeError, ValueError: ``path`` is no name of a file.
    """
    check_name(path, argument)
    with _naming(path, "read", argument):
        # Opening a pipe would wait for its writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(f"{argument}: {os.fspath(path)!r} is not a regular file")
        file = open(path, "rb")  # noqa: SIM115
    with file:
        yield file


def check_name(path: object, argument: str = "path") -> None:
    """``path`` can be the name of a file.

    Raises:
        TypeError: it is no ``str`` or ``os.PathLike`` of one.
        ValueError: no file can have that name.
    """
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {type(path).__name__}, expected the name of a file")
    try:
        fits = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise ValueError(f"{argument}: got {name!r}, expected characters that names of files can have")


def read_plain(path: AnyPath, argument: str = "path", *, legacy: bool = False) -> Any:
    """What ``torch.save`` wrote, of tensors and plain values alone, on the CPU; no code from it is run.

    Every checksum in the file is compared, which ``torch.load`` does not do. The format that torch wrote
    before 1.6 has none.

    Args:
        path: the file.
        argument: what messages call ``path``.
        legacy: also read the format that torch wrote before 1.6.

    Raises:
        OSError: the file cannot be read; names ``path``.
        ValueError: it is truncated, changed or something else; names ``path``.
    """
    with opened(path, argument) as file:
        try:
            return load_plain(file, legacy=legacy)
        except ValueError as error:
            raise ValueError(f"{argument}: {os.fspath(path)!r} cannot be read: {error}") from error


def load_plain(file: BinaryIO, *, legacy: bool = False) -> Any:
    """As :func:`read_plain`, from an open file.

    Raises:
        ValueError: it is truncated, changed or something else.
    """
    if not (legacy and _is_legacy(file)):
        _check_archive(file)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A hostile file makes the reader raise whatever it likes.
        raise ValueError(_first_line(error)) from error


def has_checksums(path: AnyPath) -> bool:
    """Whether ``torch.save`` wrote the file in the format that has them, which it does since torch 1.6."""
    with opened(path) as file:
        return not _is_legacy(file)


def _is_legacy(file: BinaryIO) -> bool:
    """Whether the file begins as a bare pickle does."""
    file.seek(0)
    return file.read(1) == pickle.PROTO


def save_plain(content: Any, path: Path) -> None:
    """Write tensors and plain values with ``torch.save``.

    Raises:
        OSError: the file cannot be written, with the system's reason where it can be found out.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        # torch keeps the system's reason to itself: what fails once more tells it.
        with path.open("ab") as file:
            file.write(bytes(_CHUNK))
            file.flush()
            os.fsync(file.fileno())
        raise OSError(errno.EIO, _first_line(error)) from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that this package wrote: no duplicate names, no NaN, of finite depth.

    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (TypeError, MemoryError) as error:
        raise ValueError(_first_line(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_archive(file: BinaryIO) -> None:
    """The file is an archive as ``torch.save`` writes it, and every checksum in it holds.

    Raises:
        ValueError: it is not.
    """
    try:
        file.seek(0)
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it is no archive of torch.save, or damaged")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch stores and never compresses: a file asks for no more memory than it is long.
            # An entry that says it is a directory would be read as if it had no content.
            if not all(map(_is_stored, entries)):
                raise ValueError("an entry of the archive is no plain stored one: it is damaged")
            if len({entry.filename for entry in entries}) != len(entries):
                raise ValueError("two entries of the archive have one name")
            damaged = archive.testzip()
    except Exception as error:
        raise ValueError(_first_line(error)) from error
    if damaged is not None:
        raise ValueError(f"the checksum of its entry {damaged!r} does not match: it is damaged")


def _is_stored(entry: zipfile.ZipInfo) -> bool:
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    return stored and not entry.external_attr & _IS_DIRECTORY and not entry.is_dir()


def _make_beside(path: Path, *, private: bool) -> Path:
    """A new empty file in the directory of ``path``, for nobody else to read if ``private``."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    # Short, whatever the name of `path` is: that may be as long as a name can be.
    temporary = path.with_name(f".sparsekern-{secrets.token_hex(6)}.tmp{suffix}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    return temporary


def _give(path: Path, old: os.stat_result) -> bool:
    """Hand ``path`` to the owner and group of the file that it replaces; whether that was permitted."""
    try:
        os.chown(path, old.st_uid, old.st_gid)
    except (OSError, AttributeError):  # not on Windows
        return False
    return True


@contextmanager
def _naming(path: AnyPath, verb: str, argument: str) -> Iterator[None]:
    """Errors of the system name ``path``."""
    try:
        yield
    except OSError as error:
        raise _named(error, path, verb, argument) from None


def _named(error: OSError, path: AnyPath, verb: str, argument: str) -> OSError:
    """``error`` of the same kind, with a message that names ``path`` once."""
    message = str(error)
    if not message.startswith(f"{argument}: "):
        message = f"{argument}: cannot {verb} {os.fspath(path)!r}: {error.strerror or message}"
    kind = type(error) if type(error).__module__ == "builtins" else OSError
    own = kind(message)
    own.errno = error.errno
    return own


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
