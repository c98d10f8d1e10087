"""Tracing: builds the channel graph of a module from example inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from sparsekern.graph.build import build
from sparsekern.graph.capture.export import Capture, arguments, capture, inner_module
from sparsekern.graph.capture.program import Registered
from sparsekern.graph.capture.undisturbed import low_overhead_tracing
from sparsekern.graph.channels import ChannelGraph
from sparsekern.graph.containers import containers
from sparsekern.graph.propagate import makeup
from sparsekern.graph.propagate.attributes import arrivals, follow, holders
from sparsekern.graph.propagate.interpret import Interpreter, Tracked
from sparsekern.graph.propagate.numbering import Numbering, number
from sparsekern.graph.propagate.records import Records, Split
from sparsekern.graph.propagate.slots import Slots
from sparsekern.graph.propagate.split_interpretations import Choices, Round, best_interpretation
from sparsekern.graph.prove.blocks import FoundBlock, find_blocks
from sparsekern.graph.prove.courses import check_courses
from sparsekern.graph.prove.recheck import Fault, faults

_PROTECTED = "protected by the user"


@low_overhead_tracing()
def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    protect: Sequence[str | nn.Module | nn.Parameter] | str | nn.Module | nn.Parameter = (),
    exact: bool = True,
    depth: bool = False,
) -> ChannelGraph:
    """Find the channels of ``model`` that can be removed without changing what the others compute.

    The model is traced in evaluation and in training mode on fake tensors. It is never run and does
    not change. By default every channel of the graph is exact: once its rows are zero, the smaller
    network gives the same outputs.

    Args:
        model: the network.
        example_inputs: a tensor, or a sequence of positional arguments of the forward. Only shapes,
            dtypes and devices matter.
        example_kwargs: keyword arguments of the forward.
        protect: modules and parameters that must keep their shapes, given as objects or as names or
            patterns (as in ``fnmatch``).
        exact: False also allows channels whose removal changes what the others compute: channels that
            are normalised or reduced over together, or are not zero where they are summed. The compact
            network then differs from the masked one and needs further training.
        depth: also find residual blocks that can be removed as a whole from their ``nn.ModuleList`` or
            ``nn.Sequential``, and prove for each that the program without it is the same but for its ops.

    Returns:
        The channel graph.

    Raises:
        ValueError: ``model`` cannot be copied or is a FullyShardedDataParallel, its forward rejects
            ``example_inputs``, it decides by the values in tensors, or ``protect`` matches nothing.

    Warns:
        UserWarning: Training mode cannot be traced and evaluation mode alone reads every parameter, or
            ``exact=False`` found groups whose removal is not exact.
    """
    model, args = inner_module(model), arguments(example_inputs)
    protected = _protected(model, protect)
    captured = capture(model, args, example_kwargs or {})
    check_courses(captured, partial(_first_round, protected=protected, exact=exact, interpretations={}))
    found = _proved(captured, _attempt(captured, protected, exact))
    refuted, follows = _refuted(found), not _divided_wrongly(found)
    if refuted or not follows:
        other = _attempt(captured, protected, exact, refuted, follows)
        # A proof only takes channels away.
        if other.size > found.size:
            found = max(found, _proved(captured, other), key=lambda one: one.size)
    blocks, sizes, refused = _blocks(captured, protected) if depth else ((), {}, {})
    graph = build(
        found.tensors, found.slots, found.records, found.numbering, captured.untraced, blocks, sizes
    )
    graph = replace(graph, frozen=(*graph.frozen, *refused.items()))
    _warn(graph)
    return graph


class _Attempt(NamedTuple):
    """An interpretation of the whole network.

    Attributes:
        tensors: the registered tensors with their slots.
        slots: all slots.
        records: the records of the settled interpretation.
        numbering: the numbers of channels and groups that are left.
        splits: the ambiguous splits.
        choices: their interpretations, by module.
        wrong: slots that a smaller copy has shown to be no channels; empty before the proof.
    """

    tensors: Sequence[Tracked]
    slots: Slots
    records: Records
    numbering: Numbering
    splits: Sequence[Split]
    choices: Mapping[str, Choices]
    wrong: Sequence[Fault] = ()

    @property
    def size(self) -> int:
        """The number of slots that belong to channels."""
        return int((self.numbering.channel_of >= 0).sum())


def _attempt(
    captured: Capture,
    protected: set[str],
    exact: bool,
    refuted: Mapping[str, Choices] | None = None,
    follows: bool = True,
) -> _Attempt:
    """Interpret the network.

    Args:
        captured: the traced model.
        protected: names of tensors that keep their shapes.
        exact: see ``trace``.
        refuted: interpretations of splits that are known to be wrong, by module.
        follows: see ``Call``.

    Returns:
        The interpretation.
    """
    (tensors, slots, assumed), choices = best_interpretation(
        lambda interpretations: _first_round(
            captured, protected=protected, exact=exact, interpretations=interpretations, follows=follows
        ),
        refuted,
    )
    _settle_rows(tensors, slots, assumed)
    slots.settle()
    records = _interpret(captured, tensors, slots, settled=True, exact=exact, follows=follows)
    numbering = number(tensors, slots, records)
    arrived = arrivals(captured, numbering, records)
    unheld = makeup.follow(tensors, slots, numbering, records, holders(arrived, records))
    if unheld:
        _freeze_all(unheld, slots)
        numbering = number(tensors, slots, records)
    follow(captured, tensors, slots, numbering, records, arrived)
    return _Attempt(tensors, slots, records, numbering, assumed.splits, choices)


def _proved(captured: Capture, attempt: _Attempt) -> _Attempt:
    """The interpretation without the channels that a smaller copy shows to be none."""
    wrong = faults(captured, attempt.tensors, attempt.numbering, attempt.records)
    if not wrong:
        return attempt
    _freeze_all(wrong, attempt.slots)
    numbering = number(attempt.tensors, attempt.slots, attempt.records)
    return attempt._replace(numbering=numbering, wrong=wrong)


def _refuted(found: _Attempt) -> dict[str, Choices]:
    """The choices for the splits through which slots run that a smaller copy has shown to be no channels."""
    wrong = np.concatenate([np.empty(0, np.int64), *(fault.ids for fault in found.wrong)])
    return {
        split.module: found.choices.get(split.module, ())
        for split in found.splits
        if len(set(split.axes)) > 1 and np.isin(split.ids, wrong).any()
    }


def _divided_wrongly(found: _Attempt) -> bool:
    """Whether a number that was taken to count channels does not."""
    wrong = np.concatenate([np.empty(0, np.int64), *(fault.ids for fault in found.wrong)])
    return any(np.isin(ids, wrong).any() for ids in found.records.divisors)


def _blocks(
    captured: Capture, protected: set[str]
) -> tuple[tuple[FoundBlock, ...], dict[str, int], dict[str, str]]:
    """The removable blocks, the sizes of all lists of modules, and why other blocks stay, by path."""
    found, refused = find_blocks(captured)
    kept = {
        block.path: _PROTECTED
        for block in found
        if any(protected.intersection(captured.tensors[number].names) for number in block.tensors)
    }
    sizes = {path: len(module._modules) for path, module in containers(captured.source.clone).items()}
    return tuple(block for block in found if block.path not in kept), sizes, refused | kept


def _warn(graph: ChannelGraph) -> None:
    """Warn if training mode was not traced, and of groups whose removal is not exact, with reasons."""
    if graph.untraced:
        warnings.warn(
            f"model: only evaluation mode was traced ({graph.untraced}); it reads every "
            "parameter, so channels are found; train the compact network for a step before you rely on it",
            stacklevel=4,
        )
    named = "; ".join(f"{group.name} ({group.inexact})" for group in graph.groups if group.inexact)
    if named:
        # Frames above this one: ``trace`` and the context manager that wraps it.
        warnings.warn(
            f"exact=False: removing channels changes what the others compute: {named}", stacklevel=4
        )


def _first_round(
    captured: Capture,
    *,
    protected: set[str],
    exact: bool,
    interpretations: Mapping[str, tuple[int, ...]],
    follows: bool = True,
) -> Round:
    """Allocate new slots and find which of them go together.

    Args:
        captured: the traced model.
        protected: names of tensors that keep their shapes.
        exact: see ``trace``.
        interpretations: see ``Interpreter``.
        follows: see ``Call``.
    """
    slots = Slots()
    tensors = [_tracked(index, entry, slots) for index, entry in enumerate(captured.tensors)]
    for tensor in tensors:
        if protected.intersection(tensor.entry.names):
            _freeze(tensor, slots, _PROTECTED)
    records = _interpret(
        captured,
        tensors,
        slots,
        settled=False,
        exact=exact,
        interpretations=interpretations,
        follows=follows,
    )
    for index in set(range(len(tensors))) - records.read:
        _freeze(tensors[index], slots, "the forward does not read it")
    return Round(tensors, slots, records)


def _tracked(index: int, entry: Registered, slots: Slots) -> Tracked:
    """Allocate slots for every dimension. A dimension of size 1 has none: it cannot shrink or couple."""
    ids = tuple(
        slots.allocate((index, dim), size) if size > 1 else None for dim, size in enumerate(entry.shape)
    )
    return Tracked(entry, ids)


def _freeze_all(faults: Iterable[tuple[np.ndarray, str]], slots: Slots) -> None:
    for ids, reason in faults:
        slots.freeze(ids, reason)


def _freeze(tensor: Tracked, slots: Slots, reason: str) -> None:
    for ids in tensor.ids:
        if ids is not None:
            slots.freeze(ids, reason)


def _interpret(
    captured: Capture,
    tensors: Sequence[Tracked],
    slots: Slots,
    *,
    settled: bool,
    exact: bool,
    interpretations: Mapping[str, tuple[int, ...]] | None = None,
    follows: bool = True,
) -> Records:
    """Apply the rules to the graphs of both modes."""
    records = Records(slots)
    interpreter = Interpreter(tensors, slots, records, settled, exact, follows, interpretations or {})
    for graph in captured.graphs:
        interpreter.run(graph)
    _freeze_all(makeup.unsuitable(tensors, slots, records), slots)
    return records


def _settle_rows(tensors: Sequence[Tracked], slots: Slots, records: Records) -> None:
    """Decide along which dimension of every parameter a masked channel is zeroed.

    This is the dimension along which a layer makes channels from the parameter. Any other parameter
    (such as a scale per channel) has rows if exactly one of its dimensions is tied to other tensors.
    """
    roots, reasons = slots.classes()
    held = slots.registered(np.arange(len(roots)))
    sizes = np.bincount(roots[held], minlength=len(roots))
    for index, tensor in enumerate(tensors):
        if not tensor.entry.parameter:
            continue
        marked = [d for d in range(len(tensor.ids)) if (index, d) in records.row_marks]
        free = [
            d
            for d, ids in enumerate(tensor.ids)
            if ids is not None and (reasons[ids] < 0).any() and (d in marked or (sizes[roots[ids]] > 1).any())
        ]
        candidates = [d for d in free if d in marked] if marked else free
        if len(candidates) > 1 and not marked:
            candidates = _by_family(index, candidates, tensors, roots, records)
        if len(candidates) == 1:
            tensor.row_dim = candidates[0]
        elif marked and not candidates:
            tensor.row_dim = marked[0]
        elif len(candidates) > 1 and marked:
            _freeze(tensor, slots, f"{tensor.entry.names[0]} makes channels along two dimensions")


def _by_family(
    index: int, dims: Sequence[int], tensors: Sequence[Tracked], roots: np.ndarray, records: Records
) -> list[int]:
    """Choose row dimensions of a tensor that is one factor of a weight, such as of a low-rank product.

    Args:
        index: the tensor's number.
        dims: its candidate dimensions.
        tensors: all registered tensors.
        roots: the class of every slot, int64 ``[slots]``.
        records: the families of tensors, rows and columns.

    Returns:
        The dimensions tied to rows of the weight. If there are none (the inner factor of a product),
        the dimensions not tied to its columns.
    """
    family = frozenset[int]().union(*(f for f in records.families if index in f))

    def along(marks: Iterable[tuple[int, int]]) -> np.ndarray:
        ids = [tensors[i].ids[d] for i, d in marks if i in family]
        return roots[np.concatenate([np.empty(0, np.int64), *(i for i in ids if i is not None)])]

    def tied(dim: int, others: np.ndarray) -> bool:
        ids = tensors[index].ids[dim]
        return ids is not None and bool(np.isin(roots[ids], others).any())

    rows, columns = along(records.row_marks), along(records.consumers)
    return [d for d in dims if tied(d, rows)] or [d for d in dims if not tied(d, columns)]


def _protected(
    model: nn.Module,
    protect: Sequence[str | nn.Module | nn.Parameter] | str | nn.Module | nn.Parameter,
) -> set[str]:
    """Names of the parameters and buffers that ``protect`` covers."""
    single = isinstance(protect, (str, nn.Module, Tensor))
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    found: set[str] = set()
    for item in [protect] if single else protect:  # type: ignore[union-attr]
        roots = [name for name, module in modules.items() if _meant(item, name, module)]
        own = {name for name, tensor in tensors.items() if _meant(item, name, tensor)}
        for root in roots:
            own |= {name for name in tensors if not root or name.startswith(f"{root}.")}
        if not own and not roots:
            shown = repr(item) if isinstance(item, str) else type(item).__name__
            raise ValueError(
                f"protect: {shown} matches nothing in {type(model).__name__}, expected names or "
                "patterns of its modules or parameters, its modules, or its parameters"
            )
        found |= own
    return found


def _meant(item: object, name: str, thing: object) -> bool:
    return fnmatchcase(name, item) if isinstance(item, str) else item is thing
