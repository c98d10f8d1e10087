"""Reading and writing of files: writes are atomic, and reads run no code from the file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import secrets
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

AnyPath = str | os.PathLike[str]

# Longest suffix that a temporary file keeps, in bytes. Writers choose their format by the suffix, but no
# format has a longer one, and a longer one might make the name of the temporary file too long.
_LONGEST_SUFFIX = 16
_CHUNK = 1 << 20
_IS_DIRECTORY = 0x10  # bit of the MS-DOS file attributes


@contextmanager
def replacing(path: AnyPath, argument: str = "path") -> Iterator[Path]:
    """Replace the file ``path`` atomically.

    The context manager makes an empty temporary file beside ``path``. At the end of the block, that file
    is flushed to disk and replaces ``path``. It has the suffix of ``path``, because writers choose their
    format by it. If the block fails, the temporary file is removed. If the process dies in the block, the old
    file does not change.

    A symbolic link stays, and the file that it points to is replaced. The new file gets the mode of the old
    file, and also its owner where the system permits it. Without an old file the umask decides the mode.
    Other hard links to the old file keep the old content. Extended attributes are not copied.

    Args:
        path: the file to write.
        argument: name of ``path`` in messages.

    Yields:
        The path of the temporary file.

    Raises:
        OSError: ``path`` cannot be written, or the disk is full; the message names ``path``. The old file is
            intact.
        TypeError, ValueError: ``path`` is not a valid file name.
    """
    destination = target(path, argument)
    with _naming(path, "write", argument):
        old = destination.stat() if destination.exists() else None
        temporary = _make_beside(destination, private=old is not None)
    try:
        mode = stat.S_IMODE((old or temporary.stat()).st_mode)
        yield temporary
        if old is not None and not _give(temporary, old):
            mode &= 0o777  # no set-user-ID or set-group-ID bits for another owner
        # The mode is set after the owner, because a change of owner clears mode bits, and after the writer,
        # which may have changed the mode.
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, destination)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _named(error, path, "write", argument) from error
        raise
    # The rename is on the disk only after the directory is flushed. Some systems cannot flush directories.
    with suppress(OSError):
        _flush(destination.parent)


@contextmanager
def new_folder(path: AnyPath, argument: str = "folder") -> Iterator[Path]:
    """Make the folder ``path`` with all of its files at once.

    The block writes to a temporary folder on the same disk. At its end, all files are flushed and the folder
    gets its name. If the block fails, or the process dies in it, there is no folder ``path``.

    Args:
        path: the folder; it has to be new or empty. Its parents are made.
        argument: name of ``path`` in messages.

    Yields:
        The temporary folder.

    Raises:
        OSError: ``path`` has files, is no folder or cannot be written; the message names ``path``.
        TypeError, ValueError: ``path`` is not a valid file name.
    """
    check_name(path, argument)
    destination = Path(os.path.realpath(path))
    with _naming(path, "write", argument):
        if destination.exists() and not destination.is_dir():
            raise NotADirectoryError("it is a file, expected a new or an empty folder")
        if destination.exists() and any(destination.iterdir()):
            raise FileExistsError("it has files, expected a new or an empty folder")
        parent = next(folder for folder in destination.parents if folder.is_dir())
        temporary = parent / f".sparsekern-{secrets.token_hex(6)}.tmp"
        temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        with _naming(path, "write", argument):
            destination.parent.mkdir(parents=True, exist_ok=True)
            if destination.exists():
                destination.rmdir()
            temporary.rename(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with suppress(OSError):
        _flush(destination.parent)


def target(path: AnyPath, argument: str = "path") -> Path:
    """The file to write for ``path``, after symbolic links are resolved.

    Args:
        path: the name of a file that may not exist yet.
        argument: name of ``path`` in messages.

    Raises:
        OSError: ``path`` is a directory, a device or write-protected, its name is too long, its symbolic
            links form a loop, or its directory does not exist; the message names ``path``.
        TypeError, ValueError: ``path`` is not a valid file name.
    """
    check_name(path, argument)
    name = os.fspath(path)
    with _naming(path, "write", argument):
        found = Path(os.path.realpath(path))
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            # No file exists under this name, or a symbolic link points to a missing file.
            if not found.parent.is_dir():
                raise FileNotFoundError(f"{str(found.parent)!r} is not a directory") from None
            return found
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{argument}: {name!r} is a directory, expected a file name")
        if not stat.S_ISREG(mode):
            # Replacing a device or a pipe would remove it from the system.
            raise OSError(f"{argument}: {name!r} is not a regular file")
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return found


@contextmanager
def opened(path: AnyPath, argument: str = "path") -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes.

    Raises:
        OSError: the file cannot be read, or is a directory, device or pipe; the message names ``path``.
        TypeError, ValueError: ``path`` is not a valid file name.
    """
    check_name(path, argument)
    with _naming(path, "read", argument):
        # The check comes before `open`, because opening a pipe waits for its writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError(f"{argument}: {os.fspath(path)!r} is not a regular file")
        file = open(path, "rb")  # noqa: SIM115
    with file:
        yield file


def check_name(path: object, argument: str = "path") -> None:
    """Check that ``path`` is a valid file name.

    Raises:
        TypeError: ``path`` is neither a ``str`` nor an ``os.PathLike`` that gives one.
        ValueError: no file can have this name.
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
    """Read tensors and plain values that ``torch.save`` wrote. No code from the file is run.

    This function compares all checksums in the file; ``torch.load`` does not. The format of torch before 1.6
    has no checksums.

    Args:
        path: the file.
        argument: name of ``path`` in messages.
        legacy: also read the format of torch before 1.6.

    Returns:
        The content, with all tensors on the CPU.

    Raises:
        OSError: the file cannot be read; the message names ``path``.
        ValueError: the file is truncated, damaged or of another format; the message names ``path``.
    """
    with opened(path, argument) as file:
        try:
            return load_plain(file, legacy=legacy)
        except ValueError as error:
            raise ValueError(f"{argument}: {os.fspath(path)!r} cannot be read: {error}") from error


def load_plain(file: BinaryIO, *, legacy: bool = False) -> Any:
    """Read an open file as :func:`read_plain` does.

    Raises:
        ValueError: the file is truncated, damaged or of another format.
    """
    if not (legacy and _is_legacy(file)):
        _check_archive(file)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # A manipulated file can make the reader raise any exception.
        raise ValueError(_first_line(error)) from error


def has_checksums(path: AnyPath) -> bool:
    """Whether the file has checksums, as those of ``torch.save`` have since torch 1.6."""
    with opened(path) as file:
        return not _is_legacy(file)


def _is_legacy(file: BinaryIO) -> bool:
    """Whether the file is a bare pickle, the format of torch before 1.6."""
    file.seek(0)
    return file.read(1) == pickle.PROTO


def save_plain(content: Any, path: Path) -> None:
    """Write tensors and plain values with ``torch.save``.

    Raises:
        OSError: the file cannot be written; has the system's reason where it is known.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        # torch hides the system's reason. A plain write fails for the same reason and reports it.
        with path.open("ab") as file:
            file.write(bytes(_CHUNK))
            file.flush()
            os.fsync(file.fileno())
        raise OSError(errno.EIO, _first_line(error)) from error


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Duplicate names, NaN, infinity and very deep nesting are refused.

    Raises:
        ValueError: ``text`` is no such JSON.
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
    """Check that the file is an archive of ``torch.save`` and that all its checksums match.

    Raises:
        ValueError: the file is no such archive, or a checksum does not match.
    """
    try:
        file.seek(0)
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it is no archive of torch.save, or damaged")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch never compresses entries, so reading needs no more memory than the size of the file.
            # An entry with the attributes of a directory would be read as empty.
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
    """Make an empty file in the directory of ``path``; only its owner can read it if ``private``."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    # The name is short, because the name of `path` may already have the maximum length.
    temporary = path.with_name(f".sparsekern-{secrets.token_hex(6)}.tmp{suffix}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    return temporary


def _give(path: Path, old: os.stat_result) -> bool:
    """Give ``path`` the owner and group of the file that it replaces.

    Returns:
        Whether the system permitted it.
    """
    try:
        os.chown(path, old.st_uid, old.st_gid)
    except (OSError, AttributeError):  # not on Windows
        return False
    return True


@contextmanager
def _naming(path: AnyPath, verb: str, argument: str) -> Iterator[None]:
    """Make the messages of system errors in the block name ``path``."""
    try:
        yield
    except OSError as error:
        raise _named(error, path, verb, argument) from None


def _named(error: OSError, path: AnyPath, verb: str, argument: str) -> OSError:
    """An error of the same kind as ``error``, with a message that names ``path`` once."""
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
