"""Lists of blocks (``nn.ModuleList`` and ``nn.Sequential``), and removing some of the blocks.

A block knows its place in the list in numbers that are no sizes: ``layer_idx`` selects the entry of a cache
of keys and values, ``config.num_hidden_layers`` tells ``generate`` how many entries to make. They follow.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsekern.graph.counts import is_guarded, is_record

# Names of attributes that count blocks, such as num_hidden_layers, n_layer, encoder_layers, depth.
_COUNT = re.compile(r"layer|block|depth")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Parts of a model that a name can mean: ``decoder_layers`` counts blocks below a module named decoder.
_SIDES = ("encoder", "decoder", "vision", "text")


@dataclass(frozen=True, eq=False)
class _Held:
    """A value of a module, or of a record that modules share.

    Attributes:
        holder: the module or record.
        name: the attribute.
        value: its value.
        root: path of the outermost module that has the record, or of the module itself.
    """

    holder: Any
    name: str
    value: Any
    root: str


def containers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the lists of two or more modules that are numbered from 0, by path; of a shared list the first."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        names = list(module._modules)
        numbered = names == [str(number) for number in range(len(names))]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(names) > 1 and numbered:
            found[path] = module
    return found


def keep_blocks(model: nn.Module, kept: Mapping[str, Sequence[int]], undo: ExitStack) -> None:
    """Remove blocks from the lists of a model, in place. The other blocks stay the same objects.

    Args:
        model: the model.
        kept: for each list, by its path, the numbers of the blocks that stay, increasing.
        undo: receives callbacks that restore the model.

    Raises:
        ValueError: the model has no such list or block, or it is not known which list a number counts.
            Nothing has changed.
    """
    lists = containers(model)
    for path, numbers in kept.items():
        size = len(lists[path]._modules) if path in lists else 0
        if not len(numbers) or not set(numbers) <= set(range(size)):
            raise ValueError(
                f"blocks: got {list(numbers)} of {path!r}, expected at least one of the {size} blocks of "
                "such a list in this model"
            )
    changes = [change for path, numbers in kept.items() for change in _positions(lists[path], numbers)]
    counted = _counted(model, lists, kept)
    for holder, name, value in changes:
        _set(holder, name, value, undo)
    _replace(model, counted, undo)
    for path, numbers in kept.items():
        table = lists[path]._modules
        undo.callback(_fill, table, dict(table))
        _fill(table, {str(new): table[str(old)] for new, old in enumerate(numbers)})


def _fill(table: dict[str, Any], entries: Mapping[str, Any]) -> None:
    table.clear()
    table.update(entries)


def _set(holder: Any, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(vars(holder).__setitem__, name, vars(holder)[name])
    vars(holder)[name] = value


def _positions(blocks: nn.Module, kept: Sequence[int]) -> Iterator[tuple[nn.Module, str, int]]:
    """The attributes that number the blocks, with the values that they get: (module, attribute, value).

    These are integers of a user's own modules that rise by one from block to block, in all blocks that have
    them, such as ``self_attn.layer_idx``.
    """
    found: dict[tuple[str, str], dict[int, tuple[nn.Module, int]]] = {}
    for number, block in enumerate(blocks.children()):
        for path, module in block.named_modules():
            for name, value in _own(module):
                if type(value) is int:
                    found.setdefault((path, name), {})[number] = module, value
    for (_, name), holders in found.items():
        starts = {value - number for number, (_, value) in holders.items()}
        if len(holders) < 2 or len(starts) > 1:
            continue
        for new, old in enumerate(kept):
            if old in holders and new != old:
                module, value = holders[old]
                yield module, name, value - old + new


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a user's module that are no modules and no tensors."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        yield "num_layers", module.num_layers
    if type(module).__module__.startswith(("torch.nn.", "sparsekern.nn.")):
        return
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and not is_guarded(module, name):
            yield name, value


def _held(model: nn.Module) -> list[_Held]:
    """All values of modules and of their records, each record once, at the outermost module that has it."""
    found, seen = [], set()
    for path, module in model.named_modules():
        for name, value in _own(module):
            if not is_record(value):
                found.append(_Held(module, name, value, path))
                continue
            waiting = [value]
            while waiting:
                record = waiting.pop()
                if id(record) in seen:
                    continue
                seen.add(id(record))
                for inner, inside in vars(record).items():
                    if is_record(inside):
                        waiting.append(inside)
                    else:
                        found.append(_Held(record, inner, inside, path))
    return found


def _counted(
    model: nn.Module, lists: Mapping[str, nn.Module], kept: Mapping[str, Sequence[int]]
) -> list[tuple[Any, str, Any]]:
    """The attributes that count or list the blocks of a list, with their new values.

    Raises:
        ValueError: an attribute may count the blocks of several lists that lose different blocks.
    """
    named = [entry for entry in _held(model) if _COUNT.search(entry.name)]
    held = [entry for entry in named if _length(entry.value)]
    changes = [change for entry in named for change in _of_stages(entry, lists, kept)]
    for entry in held:
        owner = _owner(entry, held, lists)
        if owner is not None and len(kept.get(owner, lists[owner]._modules)) < len(lists[owner]._modules):
            numbers = kept[owner]
            value = entry.value
            new = len(numbers) if type(value) is int else type(value)(value[number] for number in numbers)
            changes.append((entry.holder, entry.name, new))
            continue
        unclear = [path for path in _candidates(entry, lists) if path in kept and owner is None]
        if unclear:
            raise ValueError(
                f"blocks: got some of {unclear[0]!r} to remove, expected an attribute {entry.name!r} that "
                f"counts the blocks of one list; it may count those of {', '.join(_candidates(entry, lists))}"
            )
    return changes


def _of_stages(
    entry: _Held, lists: Mapping[str, nn.Module], kept: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Any, str, Any]]:
    """The new value of an attribute such as ``config.depths``, which counts the blocks of every stage."""
    if type(entry.value) not in (list, tuple) or len(entry.value) < 2:
        return
    stages: dict[str, list[str]] = {}
    for path in lists:
        parts = path.split(".")
        for place in [number for number, part in enumerate(parts) if part.isdecimal()]:
            stages.setdefault(".".join((*parts[:place], "*", *parts[place + 1 :])), []).append(path)
    for paths in stages.values():
        sizes = [len(lists[path]._modules) for path in paths]
        if sizes == list(entry.value) and any(path in kept for path in paths):
            left = (len(kept.get(path, lists[path]._modules)) for path in paths)
            yield entry.holder, entry.name, type(entry.value)(left)
            return


def _length(value: Any) -> int:
    """The number of blocks that an attribute may stand for; 0 if it stands for none."""
    if type(value) is int:
        return value
    if type(value) in (list, tuple):
        plain = all(type(item) is str for item in value) or all(item in (0, 1) for item in value)
        return len(value) if plain else 0
    return 0


def _candidates(entry: _Held, lists: Mapping[str, nn.Module]) -> list[str]:
    """The lists whose blocks the attribute may count: as many, below its module, of one class."""
    inside = f"{entry.root}." if entry.root else ""
    return [
        path
        for path, module in lists.items()
        if path.startswith(inside)
        and len(module._modules) == _length(entry.value)
        and len({type(block) for block in module.children()}) == 1
    ]


def _named(entry: _Held, candidates: Sequence[str]) -> list[str]:
    """The candidates below a module that the attribute's name mentions, such as ``decoder``."""
    sides = [side for side in _SIDES if side in entry.name]
    return [path for path in candidates if sides and all(side in path for side in sides)]


def _owner(entry: _Held, held: Sequence[_Held], lists: Mapping[str, nn.Module]) -> str | None:
    """The list whose blocks the attribute counts; None if there is none, or several."""
    candidates = _candidates(entry, lists)
    if len(candidates) > 1:
        named = _named(entry, candidates)
        others = [other for other in held if other.holder is entry.holder and other is not entry]
        claimed = {path for other in others for path in _named(other, _candidates(other, lists))}
        beside = [path for path in candidates if path.rpartition(".")[0] == entry.root]
        free = [path for path in candidates if path not in claimed]
        candidates = named or (beside if len(beside) == 1 else free)
    return candidates[0] if len(candidates) == 1 else None


def _replace(model: nn.Module, changes: Sequence[tuple[Any, str, Any]], undo: ExitStack) -> None:
    """Set attributes. Of records that modules share, all modules of the model get one changed copy.

    The record itself may belong to other models, too.
    """
    for holder, name, value in changes:
        if isinstance(holder, nn.Module):
            _set(holder, name, value, undo)
    wanted: dict[int, dict[str, Any]] = {}
    for holder, name, value in changes:
        if not isinstance(holder, nn.Module):
            wanted.setdefault(id(holder), {})[name] = value
    copies: dict[int, Any] = {}
    for module in model.modules() if wanted else ():
        for name, value in list(_own(module)):
            if is_record(value) and (new := _copied(value, wanted, copies)) is not value:
                _set(module, name, new, undo)


def _copied(record: Any, wanted: Mapping[int, Mapping[str, Any]], copies: dict[int, Any]) -> Any:
    """A copy of a record with the values that are wanted in it and in the records inside; itself without."""
    if id(record) not in copies:
        copies[id(record)] = record  # a record may contain itself
        inside = {name: value for name, value in vars(record).items() if is_record(value)}
        new = {name: _copied(value, wanted, copies) for name, value in inside.items()}
        changed = {name: value for name, value in new.items() if value is not inside[name]}
        changed |= wanted.get(id(record), {})
        if changed:
            copies[id(record)] = copy.copy(record)
            vars(copies[id(record)]).update(changed)
    return copies[id(record)]
