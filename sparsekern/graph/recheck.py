"""Checking what the trace can only guess: sizes that a program may have written out.

``view(n, 4, c // 4, h, w)`` and ``view(n, c // 4, 4, h, w)`` leave the same trace where c is 16.
The rules read such a split as a fixed number of equal groups. Here the traced copy is shrunk under
that reading and traced again: a guess that does not come out in the predicted shapes is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .capture import Capture, Captured, Source
from .interpret import Tracked, shapes
from .numbering import Numbering
from .records import Records
from .values import Value


@dataclass(frozen=True)
class WrongGuess:
    """Raw slot ids that were tied by a guess, and what showed it to be wrong."""

    ids: np.ndarray
    reason: str


def wrong_guesses(
    captured: Capture, tensors: Sequence[Tracked], numbering: Numbering, records: Records
) -> list[WrongGuess]:
    """The guesses of prunable slots that a smaller copy does not bear out."""
    guesses = {key: ids for key, ids in records.guesses.items() if (numbering.channel_of[ids] >= 0).any()}
    if not guesses:
        return []
    gone = _half(numbering, np.concatenate(list(guesses.values())))
    wrong: list[WrongGuess] = []
    with _shrunk(captured.source, tensors, gone):
        for graph in captured.graphs:
            mode = not graph.training
            of_mode = {node: ids for (m, node), ids in guesses.items() if m == mode}
            if not of_mode:
                continue
            try:
                small = captured.source.export(graph.training)
            except ValueError as error:
                reason = f"a smaller copy cannot be traced: {str(error).rpartition('it raised ')[2]}"
                return [WrongGuess(ids, reason) for ids in guesses.values()]
            wrong += _compare(graph, small, of_mode, records, gone)
    return wrong


def _half(numbering: Numbering, guessed: np.ndarray) -> np.ndarray:
    """Which slots go (bool): every second channel of the groups that the guesses touch."""
    touched = numbering.channel_of[guessed]
    gone = np.zeros(len(numbering.group_of), bool)
    for group in np.unique(numbering.group_of[touched[touched >= 0]]):
        gone[np.flatnonzero(numbering.group_of == group)[1::2]] = True
    return (numbering.channel_of >= 0) & gone[numbering.channel_of]


def _compare(
    before: Captured,
    small: Captured,
    guesses: dict[str, np.ndarray],
    records: Records,
    gone: np.ndarray,
) -> list[WrongGuess]:
    pairs = list(zip(_steps(before), _steps(small), strict=False))
    alike = len(_steps(before)) == len(_steps(small)) and all(
        (a.name, a.target) == (b.name, b.target) for a, b in pairs
    )
    if not alike:
        return [WrongGuess(ids, "a smaller copy runs other ops") for ids in guesses.values()]
    differ = set()
    for old, new in pairs:
        values = records.values.get((not before.training, old.name))
        if values is None:
            continue
        made = values if isinstance(values, tuple) else (values,)
        if [_predicted(v, gone) for v in made] != [shape for shape, _ in shapes(new)]:
            differ.add(old.name)
    found = differ.intersection(guesses) or (set(guesses) if differ else set())
    reason = "it is split into parts of a fixed size"
    return [WrongGuess(guesses[node], reason) for node in guesses if node in found]


def _steps(graph: Captured) -> list[fx.Node]:
    return [node for node in graph.module.graph.nodes if node.op == "call_function"]


def _predicted(value: Value, gone: np.ndarray) -> tuple[int, ...]:
    return tuple(
        size if ids is None else int(((ids < 0) | ~gone[ids]).sum())
        for size, ids in zip(value.shape, value.ids, strict=True)
    )


@contextmanager
def _shrunk(source: Source, tensors: Sequence[Tracked], gone: np.ndarray) -> Iterator[None]:
    """The copy with smaller tensors, and with the sizes that layers keep beside them."""
    left = {id(t): _left(tensors[n], gone) for t, n in source.numbered()}
    made = {id(t): _smaller(source, t, left[id(t)]) for t, _ in source.numbered()}
    restore: list[tuple[dict[str, Any], str, Any]] = []
    for module in source.clone.modules():
        own = {
            n: left[id(t)]
            for n, t in (*module._parameters.items(), *module._buffers.items())
            if t is not None
        }
        for name, size in _sizes(module, own).items():
            restore.append((module.__dict__, name, module.__dict__[name]))
            module.__dict__[name] = size
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    restore.append((table, name, tensor))
                    table[name] = made[id(tensor)]
    try:
        yield
    finally:
        for table, name, old in restore:
            table[name] = old


def _left(tensor: Tracked, gone: np.ndarray) -> list[np.ndarray]:
    """Per dimension the indices that stay."""
    return [
        np.arange(size) if ids is None else np.flatnonzero((ids < 0) | ~gone[ids])
        for size, ids in zip(tensor.entry.shape, tensor.ids, strict=True)
    ]


def _smaller(source: Source, tensor: Tensor, left: list[np.ndarray]) -> Tensor:
    with source.mode:
        small = torch.empty([len(k) for k in left], dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(small, tensor.requires_grad)
    return small


def _sizes(module: nn.Module, left: dict[str, list[np.ndarray]]) -> dict[str, int]:
    """New values of the attributes in which torch's layers repeat the shape of their weight."""
    held = left.get("weight", left.get("running_mean"))
    if held is None:
        return {}
    first, sizes = held[0], [len(k) for k in held]
    if isinstance(module, nn.modules.conv._ConvNd):
        old = module.in_channels if module.transposed else module.out_channels
        groups = len(np.unique(first // (old // module.groups)))
        outer, inner = sizes[0], sizes[1] * groups
        into, out = (outer, inner) if module.transposed else (inner, outer)
        return {"groups": groups, "in_channels": into, "out_channels": out}
    if isinstance(module, nn.GroupNorm):
        groups = len(np.unique(first // (module.num_channels // module.num_groups)))
        return {"num_groups": groups, "num_channels": sizes[0]}
    if isinstance(module, nn.Linear):
        return {"out_features": sizes[0], "in_features": sizes[1]}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return {"num_features": sizes[0]}
    return {}
