"""Pruning plans: the indices of each tensor that stay, as plain data without modules or devices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsekern.compact.block_plans import (
    ListPlan,
    check_lists,
    inside,
    kept_of,
    lists_after,
    lists_from_json,
    lists_then,
    lists_to_json,
    stays,
)
from sparsekern.compact.indices import Indices, Runs, check_indices, to_runs
from sparsekern.compact.plan_checks import (
    check_mapping,
    check_shapes,
    check_size,
    check_sizes,
    expect,
    is_whole,
)
from sparsekern.files.atomic import parse_json
from sparsekern.files.schema import describe, shorten
from sparsekern.graph.numbers import after_removal, before_removal
from sparsekern.graph.rescale import Rescale

if TYPE_CHECKING:
    from sparsekern.graph import ChannelGraph

FORMAT = "sparsekern.plan"
VERSION = 3
_WITHOUT_BLOCKS, _WITHOUT_RESCALE = 2, 1


# The most indices of a plan read without known shapes: 128 MiB, ten times the need of the widest networks.
_MOST_INDICES = 1 << 24

_DIMENSION = re.compile(r"0|[1-9][0-9]?")


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """The part of one tensor that stays.

    Attributes:
        shape: the tensor's shape before anything is removed.
        keep: the indices kept along each cut dimension: int64, strictly increasing, at least one. A dimension
            that stays whole is not listed.
        sizes: attributes of the user's modules that count the tensor's indices, such as
            ``blocks.0.attn.num_heads``, mapped to (dimension, indices per unit).
        rescale: how the tensor's values follow the number of its indices; None if they do not.

    Raises:
        ValueError: an argument breaks these conditions.
    """

    shape: tuple[int, ...]
    keep: Mapping[int, Indices] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rescale: Rescale | None = None

    def __post_init__(self) -> None:
        shape = check_sizes(self.shape)
        keep = {}
        for dim, indices in check_mapping("keep", self.keep, "dimension -> indices").items():
            if not is_whole(dim) or not 0 <= dim < len(shape):
                raise ValueError(f"keep: dimension {dim} does not exist in a tensor of {shape}")
            checked = check_indices(indices, shape[dim], dim)
            if len(checked) < shape[dim]:
                keep[int(dim)] = checked
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "keep", dict(sorted(keep.items())))
        object.__setattr__(
            self, "sizes", dict(check_mapping("sizes", self.sizes, "attribute -> (dimension, indices)"))
        )
        for path, size in self.sizes.items():
            check_size(path, size, shape, self.new_shape)
        if self.rescale is not None:
            self.rescale.check(shape)

    @property
    def new_shape(self) -> tuple[int, ...]:
        """The tensor's shape after the plan is carried out."""
        kept = self.keep
        return tuple(len(kept[d]) if d in kept else size for d, size in enumerate(self.shape))

    @property
    def factor(self) -> float:
        """The factor by which the tensor's values grow, because a mean runs over fewer channels; else 1."""
        rule = self.rescale
        if rule is None or rule.dim not in self.keep:
            return 1.0
        return rule.factor(self.shape[rule.dim], self.new_shape[rule.dim])

    @property
    def offset(self) -> float:
        """The constant that the network adds to the tensor before it multiplies by it; else 0."""
        return 0.0 if self.rescale is None else self.rescale.offset

    def then(self, later: TensorPlan) -> TensorPlan:
        """This plan followed by ``later``, which is relative to ``new_shape``."""
        if later.shape != self.new_shape:
            raise ValueError(f"later: got a part of shape {later.shape}, expected {self.new_shape}")
        keep = dict(self.keep)
        for dim, indices in later.keep.items():
            keep[dim] = keep[dim][indices] if dim in keep else indices
        return TensorPlan(self.shape, keep, {**self.sizes, **later.sizes}, later.rescale or self.rescale)

    def inside(self, prefix: str) -> TensorPlan:
        """The same part with ``prefix`` in front of the attribute names in ``sizes``."""
        sizes = {f"{prefix}.{path}": size for path, size in self.sizes.items()}
        rescale = None if self.rescale is None else self.rescale.inside(prefix)
        return replace(self, sizes=sizes, rescale=rescale)

    def renamed(self, name_of: Callable[[str], str | None]) -> TensorPlan:
        """The same part with other attribute names; without those for which ``name_of`` gives None."""
        moved = {name_of(path): size for path, size in self.sizes.items()}
        sizes = {path: size for path, size in moved.items() if path is not None}
        return replace(
            self, sizes=sizes, rescale=None if self.rescale is None else self.rescale.renamed(name_of)
        )

    def after(self, done: TensorPlan) -> TensorPlan:
        """The rest of this plan after ``done`` was carried out: ``done.then(result)`` equals this plan."""
        if done.shape != self.shape:
            raise ValueError(f"done: got a part of shape {done.shape}, expected {self.shape}")
        keep = dict(self.keep)
        for dim, left in done.keep.items():
            wanted = keep.get(dim, np.arange(self.shape[dim]))
            if not np.isin(wanted, left).all():
                raise ValueError(
                    f"done: got a part without indices of dimension {dim} that this plan keeps, expected one "
                    f"that keeps them"
                )
            keep[dim] = np.searchsorted(left, wanted)
        return TensorPlan(done.new_shape, keep, self.sizes, self.rescale)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorPlan):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.sizes == other.sizes
            and self.rescale == other.rescale
            and self.keep.keys() == other.keep.keys()
            and all(np.array_equal(self.keep[d], other.keep[d]) for d in self.keep)
        )


@dataclass(frozen=True)
class Plan:
    """The indices of parameters and buffers that stay, by tensor name.

    Attributes:
        tensors: the part of each tensor that stays. A tensor that is not listed stays whole. One name of a
            tied tensor suffices. The plan of an uncut model is ``Plan({})``.
        blocks: the modules that stay of each list that loses some, by the list's path. All names in a plan
            are those before any removal. Tensors of removed modules are not listed.
    """

    tensors: Mapping[str, TensorPlan]
    blocks: Mapping[str, ListPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, part in check_mapping("tensors", self.tensors, "str -> TensorPlan").items():
            if not isinstance(name, str) or not isinstance(part, TensorPlan):
                raise ValueError(
                    f"tensors: got {name!r} -> {type(part).__name__}, expected str -> TensorPlan"
                )
        blocks = check_lists(self.blocks)
        blocks = {path: part for path, part in blocks.items() if _stays_in_others(path, blocks)}
        tensors = {name: part for name, part in self.tensors.items() if not blocks or stays(name, blocks)}
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "blocks", blocks)

    @property
    def removes_nothing(self) -> bool:
        """Whether every tensor stays whole."""
        return not self.blocks and not any(part.keep for part in self.tensors.values())

    def then(self, later: Plan) -> Plan:
        """One plan for the original model that equals this plan followed by ``later``.

        Args:
            later: a plan for the model that this plan leaves.

        Raises:
            ValueError: the shapes in ``later`` differ from those that this plan leaves.
        """
        tensors, old_name = dict(self.tensors), partial(before_removal, kept=kept_of(self.blocks))
        for new, part in later.tensors.items():
            name, part = (old_name(new), part.renamed(old_name)) if self.blocks else (new, part)
            try:
                tensors[name] = tensors[name].then(part) if name in tensors else part
            except ValueError as error:
                raise ValueError(f"later: tensor {name!r}: {error}") from None
        return Plan(tensors, lists_then(self.blocks, later.blocks))

    def after(self, done: Plan) -> Plan:
        """The rest of this plan for a model on which ``done`` was carried out already.

        Raises:
            ValueError: ``done`` removed indices or blocks that this plan keeps.
        """
        blocks, new_name = (
            lists_after(self.blocks, done.blocks),
            partial(after_removal, kept=kept_of(done.blocks)),
        )
        tensors = {}
        for name in {**self.tensors, **done.tensors}:
            first = done.tensors.get(name)
            if not stays(name, self.blocks):
                continue
            try:
                own = self.tensors[name] if name in self.tensors else TensorPlan(done.tensors[name].shape)
                rest = own if first is None else own.after(first)
            except ValueError as error:
                raise ValueError(f"done: tensor {name!r}: {error}") from None
            tensors[new_name(name) or name] = rest.renamed(new_name) if done.blocks else rest
        return Plan(tensors, blocks)

    def inside(self, prefix: str) -> Plan:
        """The same plan for another model that holds this model as its submodule ``prefix``."""
        if not prefix:
            return self
        tensors = {f"{prefix}.{name}": part.inside(prefix) for name, part in self.tensors.items()}
        return Plan(tensors, inside(self.blocks, prefix))

    def to_json(self) -> str:
        """The plan as JSON text. Each distinct set of indices is written once, as runs: ``0-3,7``.

        Equal plans give equal text, independent of the number of cuts that led to them.
        """
        numbers: dict[str, int] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for name, part in sorted(self.tensors.items()):
            keep = {
                str(dim): numbers.setdefault(to_runs(indices), len(numbers))
                for dim, indices in sorted(part.keep.items())
            }
            tensors[name] = {"shape": list(part.shape), "keep": keep}
            if part.sizes:
                tensors[name]["sizes"] = {path: list(size) for path, size in sorted(part.sizes.items())}
            if part.rescale is not None:
                tensors[name]["rescale"] = part.rescale.to_plain()
        # Version 1 knows no rescale, version 2 no blocks. Their readers have to refuse such a plan.
        rescales = any(part.rescale is not None for part in self.tensors.values())
        version = VERSION if self.blocks else _WITHOUT_BLOCKS if rescales else _WITHOUT_RESCALE
        blocks = lists_to_json(self.blocks, lambda kept: numbers.setdefault(to_runs(kept), len(numbers)))
        document = {"format": FORMAT, "version": version, "indices": list(numbers), "tensors": tensors}
        if blocks:
            document["blocks"] = blocks
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Plan:
        """The plan that ``to_json`` wrote.

        A short text can stand for very many indices, so arrays are made only after the sizes are checked.

        Args:
            text: JSON.
            shapes: shapes of the tensors that the plan is for, by name; None where they are unknown.

        Raises:
            ValueError: the text is not a plan, or names tensors or shapes that are not in ``shapes``. Without
                ``shapes`` also a plan with more than 2**24 indices.
        """
        try:
            document = parse_json(text)
        except ValueError as error:
            raise ValueError(f"text: got no valid JSON, expected a plan as JSON ({error})") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"text: got JSON that is not a plan, expected an object of format {FORMAT!r}")
        if document.get("version") not in (VERSION, _WITHOUT_BLOCKS, _WITHOUT_RESCALE):
            raise ValueError(
                f"text: got a plan of version {describe(document.get('version'))}, expected {VERSION}"
            )
        sets = [Runs(runs) for runs in expect(document, "indices", list)]
        entries = expect(document, "tensors", dict)
        claimed, tensors = {}, {}
        for name, entry in entries.items():
            with _naming_tensor(name):
                claimed[name] = tuple(expect(entry, "shape", list))
        if shapes is not None:
            check_shapes(claimed, shapes)
        elif (count := sum(runs.count for runs in sets)) > _MOST_INDICES:
            raise ValueError(
                f"text: got {count} indices, expected no more than the shapes of the tensors have (at most "
                f"{_MOST_INDICES} where they are not given)"
            )
        for name, entry in entries.items():
            with _naming_tensor(name):
                tensors[name] = _tensor_from_json(entry, claimed[name], sets)
        return cls(tensors, lists_from_json(document.get("blocks", {}), sets))

    def __str__(self) -> str:
        lines = [
            f"{name}: {list(part.shape)} -> {list(part.new_shape)}"
            for name, part in self.tensors.items()
            if part.keep
        ]
        lines += [
            f"{p or 'the model'}: {part.count} blocks -> {len(part.keep)}" for p, part in self.blocks.items()
        ]
        return "\n".join(lines) or "nothing is removed"


def make_plan(graph: ChannelGraph, kept: Sequence[bool] | np.ndarray[Any, Any]) -> Plan:
    """The plan that keeps exactly the channels of ``graph`` marked in ``kept``.

    Args:
        graph: the channels of the model.
        kept: bool array ``[graph.num_channels]``, or a bool tensor on the CPU.

    Raises:
        ValueError: ``kept`` has another dtype or length, or keeps no channel of a group.
    """
    mask = np.asarray(kept)
    if mask.dtype != np.bool_ or mask.shape != (graph.num_channels,):
        raise ValueError(f"kept: got {mask.dtype} {list(mask.shape)}, expected bool [{graph.num_channels}]")
    mask = graph.without_inner(mask)
    if empty := graph.emptied_groups(mask):
        raise ValueError(f"kept: got no channel of {shorten(empty)}, expected at least one of every group")
    stays_of = np.append(mask, True)  # the last entry stands for index -1: slots without a channel
    parts: dict[bytes, Indices] = {}
    tensors = {}
    left = graph.kept_blocks(mask)
    sizes_of = {block.container: block.size for block in graph.blocks}
    for name, slots in graph.tensors.items():
        if after_removal(name, left) is None:
            continue
        keep = {}
        for dim, channels in enumerate(slots.channels):
            if channels is None:
                continue
            stays = stays_of[channels]
            if not stays.all():
                # Few distinct sets occur, each in many tensors, so tensors share one array.
                keep[dim] = parts.setdefault(stays.tobytes(), np.flatnonzero(stays))
        sizes = {path: (dim, per) for path, dim, per in slots.sizes}
        tensors[name] = TensorPlan(tuple(slots.shape), keep, sizes, slots.rescale)
    return Plan(tensors, {path: ListPlan(sizes_of[path], numbers) for path, numbers in left.items()})


def _stays_in_others(path: str, blocks: Mapping[str, ListPlan]) -> bool:
    """Whether the list ``path`` is not a part of a module that another list loses."""
    return stays(path, {other: part for other, part in blocks.items() if other != path})


@contextmanager
def _naming_tensor(name: str) -> Iterator[None]:
    """Put the tensor's name in front of a ``ValueError`` of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"text: tensor {describe(name)}: {error}") from None


def _tensor_from_json(entry: Any, shape: tuple[Any, ...], sets: Sequence[Runs]) -> TensorPlan:
    check_sizes(shape)
    keep = {}
    for text, number in expect(entry, "keep", dict).items():
        dim = int(text) if _DIMENSION.fullmatch(text) else -1
        if dim < 0 or type(number) is not int or not 0 <= number < len(sets):
            raise ValueError(
                f"keep: got {describe(text)}: {describe(number)}, expected dimension: number of a set of "
                f"indices"
            )
        if dim >= len(shape):
            raise ValueError(f"keep: dimension {dim} does not exist in a tensor of {shape}")
        keep[dim] = sets[number].within(shape[dim], dim)
    sizes = {}
    for path, size in expect(entry, "sizes", dict).items() if "sizes" in entry else ():
        if not isinstance(size, list):
            raise ValueError(
                f"sizes: got {describe(path)}: {describe(size)}, expected [dimension, indices per unit]"
            )
        sizes[path] = tuple(size)
    rescale = Rescale.from_plain(entry["rescale"]) if "rescale" in entry else None
    return TensorPlan(shape, keep, sizes, rescale)
