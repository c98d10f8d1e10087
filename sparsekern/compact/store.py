"""Model files: safetensors with the plan in the metadata, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsekern.compact.block_plans import check_counts, kept_of
from sparsekern.compact.plan import Plan, TensorPlan
from sparsekern.compact.surgery import (
    Registered,
    build,
    compact,
    cut,
    lengths,
    match,
    memory_order,
    placeholder,
    plan_of,
    registered,
    remember,
    remove_blocks,
    shapes_of,
)
from sparsekern.distributed.tensors import unwrap
from sparsekern.files.atomic import check_name, opened, parse_json, replacing, target
from sparsekern.files.schema import TEXT, Entries, Fields, Items, Row, Whole, shorten
from sparsekern.graph.numbers import before_removal
from sparsekern.nn.held_factor import holds_factors

FORMAT = "sparsekern.model"
VERSION = "1"

_KEYS = ("format", "version", "class", "plan", "tied", "sha256")
# This key is optional.
_MADE_BY = "made_by"


_LONGEST_HEADER = 100_000_000

_TENSOR = Fields({"dtype": TEXT, "shape": Items(Whole(0)), "data_offsets": Row([Whole(0), Whole(0)])})
HEADER = Fields({}, {"__metadata__": Entries(TEXT, TEXT)}, others=_TENSOR)
"""Schema of the JSON header of a safetensors file."""


@dataclass(frozen=True)
class Stored:
    """The content of an undamaged file that ``save`` wrote.

    Attributes:
        path: path of the file.
        metadata: texts by the keys of the format.
        values: tensors by name, on the CPU.
    """

    path: str
    metadata: Mapping[str, str]
    values: Mapping[str, Tensor]

    @property
    def made_by(self) -> Any:
        """The value of ``made_by`` at ``save``, as plain unchecked data; None if there was none.

        Raises:
            ValueError: the value is not JSON.
        """
        try:
            return parse_json(self.metadata.get(_MADE_BY, "null"))
        except ValueError:
            raise ValueError(
                f"path: got {self.path!r}, whose entry 'made_by' is not valid JSON, expected a file of save()"
            ) from None


def save(
    module: nn.Module, path: str | os.PathLike[str], *, made_by: Mapping[str, Any] | None = None
) -> None:
    """Write the parameters, persistent buffers and plan of ``module`` to ``path``.

    The file is safetensors: any reader of that format gets the tensors under their names in the module, tied
    ones once. A dense module has an empty plan. The file appears under its name only after it is complete and
    on the disk; an existing file stays intact until then.

    Args:
        module: the module, possibly wrapped.
        path: the file to write.
        made_by: plain data about the origin of the module, see :attr:`Stored.made_by`.

    Raises:
        TypeError: ``module`` is not a module.
        OSError: ``path`` cannot be written; the error names it.
        ValueError: the format cannot hold a tensor, extra state or ``made_by``.
    """
    module = unwrap(module)
    target(path)  # a bad path fails before the tensors are gathered
    if isinstance(module, nn.Module) and holds_factors(module):
        module = compact(module, Plan({}))  # a file has to be right for modules of the user's own classes
    entries = [entry for entry in registered(module) if entry.persistent]
    _check_storable(module, entries)
    tensors = _on_host(entries)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "class": type(module).__qualname__,
        "plan": plan_of(module).to_json(),
        "tied": json.dumps({alias: e.names[0] for e in entries for alias in e.names[1:]}),
    }
    if made_by is not None:
        metadata[_MADE_BY] = _plain(made_by)
    metadata["sha256"] = _digest(metadata, tensors)
    try:
        with replacing(path) as temporary:
            _write(tensors, temporary, metadata)
    except KeyError as error:
        names = [name for name, tensor in tensors.items() if tensor.dtype == error.args[0]]
        raise ValueError(
            f"module: got {shorten(names)} of dtype {error}, expected dtypes that safetensors can hold"
        ) from None


def load(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A copy of ``module``, cut by the plan of the file and filled with the file's values.

    Values have the same bits and dtype as at ``save``. No code from the file is run.

    Args:
        module: the full-size network from its factory, on any device; it stays unchanged. The copy of a
            module on ``meta`` is on the CPU.
        path: a file that ``save`` wrote.

    Returns:
        The filled copy.

    Raises:
        TypeError: ``module`` is not a module.
        OSError: ``path`` cannot be read; the error names it.
        ValueError: the file is damaged, was not written by ``save``, was changed since, or holds another
            network; the error names ``path``.
    """
    check_name(path)
    module = unwrap(module)
    return fill(module, read(path))


def fill(module: nn.Module, stored: Stored) -> nn.Module:
    """The result of ``load`` for a file that :func:`read` has read."""
    tensors = registered(module)
    metadata, values = stored.metadata, stored.values
    where = f"path: got {stored.path!r}, which holds a {metadata['class'][:60]}"
    try:
        done = plan_of(module)
        shapes = shapes_of(tensors) | {name: part.shape for name, part in done.tensors.items()}
        plan = Plan.from_json(metadata["plan"], shapes)
        # A module that was already cut by the same plan only needs the values.
        left = Plan({}) if done == plan else plan
        parts = match(left, tensors)
        check_counts(left.blocks, lengths(module))
        tied = parse_json(metadata["tied"])
        Entries(TEXT, TEXT).check(tied, "tied")
        values = _by_name(values, tied)
        values = {before_removal(name, kept_of(left.blocks)): value for name, value in values.items()}
    except ValueError as error:
        raise ValueError(
            f"{where}, expected a file that fits this {type(module).__name__}: {error}"
        ) from None
    problems = list(_mismatches([e for e in tensors if not e.goes(left)], parts, values))
    if problems:
        raise ValueError(
            f"{where}, expected the tensors of this {type(module).__name__}: {shorten(problems)}"
        )
    loaded = build(
        module,
        tensors,
        parts,
        lambda e: placeholder(e.tensor) if e.goes(left) else _filled(e, parts, values),
    )
    remove_blocks(loaded, left)
    remember(module, loaded, tensors, parts, left.blocks)
    return loaded


def _plain(made_by: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(made_by), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"made_by: got a value that JSON cannot hold ({error}), expected dicts, lists, texts and numbers"
        ) from None


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _check_storable(module: nn.Module, entries: list[Registered]) -> None:
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"module: got extra state of {name or type(part).__name__!r}, expected only tensors in its "
                f"state_dict()"
            )
    for entry in entries:
        if entry.tensor.is_meta:
            raise ValueError(
                f"module: got {entry.names[0]!r} on the meta device, without values, expected a tensor with "
                f"values"
            )


def _on_host(entries: Iterable[Registered]) -> dict[str, Tensor]:
    """The tensors by their first names: on the CPU, contiguous, each in its own memory."""
    tensors: dict[str, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for entry in entries:
        tensor = entry.tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # Views of one storage (a buffer that is a part of another) are written as separate tensors.
        if id(storage) in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages[id(storage)] = storage
        tensors[entry.names[0]] = tensor
    return tensors


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the whole content: metadata, names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    keys = [key for key in (*_KEYS, _MADE_BY) if key in metadata and key != "sha256"]
    head = [[key, metadata[key]] for key in keys]
    names = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    digest.update(json.dumps([head, names]).encode())
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]).numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def read(path: str | os.PathLike[str]) -> Stored:
    """The content of a model file.

    Raises:
        OSError: ``path`` cannot be read.
        ValueError: the file is damaged, was not written by :func:`save` or was changed since.
    """
    path = Path(path)
    _check_complete(path)
    where = f"path: got {os.fspath(path)!r}, which"
    try:
        # Metadata and tensors come from one handle, as another process may replace the file at any time.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or any(key not in metadata for key in _KEYS):
                raise ValueError(
                    f"{where} was not written by sparsekern, expected a file of sparsekern.save()"
                )
            if metadata["version"] != VERSION:
                raise ValueError(f"{where} has format version {metadata['version'][:20]}, expected {VERSION}")
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ValueError:
        raise
    except OSError as error:
        raise OSError(f"path: cannot read {os.fspath(path)!r}: {error}") from error
    except Exception as error:
        # A SafetensorError, or any error that torch raises for unknown dtypes and invalid shapes.
        raise ValueError(f"{where} is damaged, expected a complete file: {error}") from error
    if _digest(metadata, values) != metadata["sha256"]:
        raise ValueError(f"{where} was changed after it was saved, expected one whose checksum is right")
    return Stored(os.fspath(path), metadata, values)


def _check_complete(path: Path) -> None:
    """Check that the file has the length that its header states.

    Raises:
        OSError: ``path`` cannot be read.
        ValueError: the file is truncated, or it is not a safetensors file.
    """
    where = f"path: got {os.fspath(path)!r}, which"
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        # The limit guards against files of other formats, whose first eight bytes are no length.
        start = file.read(min(length, size, _LONGEST_HEADER))
    if size < 8 or not start.startswith(b"{") or length > _LONGEST_HEADER:
        raise ValueError(
            f"{where} is not a safetensors file ({size} bytes), expected a file of sparsekern.save()"
        )
    if len(start) < length:
        raise ValueError(f"{where} is truncated: {size} bytes, expected {8 + length} or more")
    try:
        header = parse_json(start)
        HEADER.check(header, "header")
    except ValueError as error:
        raise ValueError(f"{where} is not a safetensors file, its header is damaged: {error}") from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise ValueError(f"{where} is truncated: {size} bytes, expected {expected}")


def _by_name(values: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    return {**values, **{alias: values[name] for alias, name in tied.items() if name in values}}


def _mismatches(
    tensors: Iterable[Registered], parts: Mapping[int, TensorPlan], values: Mapping[str, Tensor]
) -> Iterator[str]:
    """The differences between file and module, one text per tensor."""
    persistent = [entry for entry in tensors if entry.persistent]
    for entry in persistent:
        found = {name: values[name] for name in entry.names if name in values}
        if not found:
            yield f"{entry.names[0]!r} is missing"
        for name, value in found.items():
            expected = parts[id(entry.tensor)].new_shape
            if tuple(value.shape) != expected:
                yield f"{name!r} is {list(value.shape)} instead of {list(expected)}"
            elif _kind(value) != _kind(entry.tensor):
                yield f"{name!r} is {value.dtype} instead of {entry.tensor.dtype}"
            elif not torch.equal(_bytes(value), _bytes(next(iter(found.values())))):
                yield f"{name!r} differs from {entry.names[0]!r}, to which it is tied"
    for name in sorted(values.keys() - {name for entry in persistent for name in entry.names}):
        yield f"{name!r} is not expected"


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _filled(entry: Registered, parts: Mapping[int, TensorPlan], values: Mapping[str, Tensor]) -> Tensor:
    """The tensor of the copy: from the file, or the cut buffer of the module if it is not persistent."""
    tensor = entry.tensor
    if not entry.persistent:
        if tensor.is_meta:
            raise ValueError(
                f"module: got the buffer {entry.names[0]!r} on the meta device, without values, expected "
                f"values, because files do not hold it"
            )
        return cut(tensor, parts[id(tensor)])
    value: Any = next(values[name] for name in entry.names if name in values)
    order = memory_order(tensor)
    inverse = sorted(range(tensor.ndim), key=order.__getitem__)
    # The value read is a view of the file, so it is copied, in the memory order of the module's tensor.
    own = value.permute(order).clone(memory_format=torch.contiguous_format)
    return own.to("cpu" if tensor.is_meta else tensor.device).permute(inverse)
