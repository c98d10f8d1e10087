"""Numbers of channels that the user's own modules keep as attributes, such as ``num_heads``.

A forward that reshapes to ``self.num_heads`` runs with fewer heads only if the attribute changes, too.
To find the attribute, the traced copy runs with marked numbers in place of its attributes: a number
that arrives in a reshape still has its mark.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.export import Capture
from sparsekern.graph.capture.source import Source as SourceOfModel
from sparsekern.graph.counts import own_numbers, set_number
from sparsekern.graph.epsilons import own_floats
from sparsekern.graph.propagate.counting import Finder, Source
from sparsekern.graph.propagate.interpret import Tracked
from sparsekern.graph.propagate.numbering import Numbering
from sparsekern.graph.propagate.records import Epsilon, Records, Shaped
from sparsekern.graph.propagate.slots import Slots

_RESHAPES = frozenset({"view", "reshape", "unflatten", "expand", "broadcast_to", "repeat", "tile"})
_MADE = frozenset({"zeros", "ones", "empty", "full"})
_CUTS = frozenset({"split", "split_with_sizes", "tensor_split", "narrow", "__getitem__"})


class _Mark(int):
    """A number marked with the attributes that it is computed from.

    Attributes:
        sources: the attributes; one if the number is the attribute itself.
        computed: gives the number for other values of the attributes.
        scaled: whether a number without a mark, perhaps the size of a tensor, multiplies or divides it. Such
            a size follows the channels by itself, so that nothing is known about the attributes.
        distinct: whether the mark has another hash than its number, so that a function that caches results by
            numbers computes them again. A table of numbers then lacks it.
    """

    sources: tuple[Source, ...]
    scaled: bool = False
    computed: Callable[[Mapping[Source, int]], int]
    distinct: ClassVar[bool] = True

    def __hash__(self) -> int:
        return hash((_Mark, int(self))) if self.distinct else super().__hash__()


def _computed(name: str) -> Any:
    plain = getattr(int, name)

    def operate(self: _Mark, *other: Any) -> Any:
        result = plain(self, *other)
        if type(result) is not int:
            return result
        numbers = (self, *other)
        mark = _Mark(result)
        sources = (source for number in numbers for source in getattr(number, "sources", ()))
        mark.sources = tuple(dict.fromkeys(sources))
        unmarked = any(not isinstance(n, _Mark) and abs(n) > 1 for n in numbers)
        scales = any(part in name for part in ("mul", "div"))
        mark.scaled = (scales and unmarked) or any(getattr(n, "scaled", False) for n in numbers)
        mark.computed = lambda values: int(
            plain(*(n.computed(values) if isinstance(n, _Mark) else int(n) for n in numbers))
        )
        return mark

    return operate


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "neg"):
    setattr(_Mark, f"__{_operator}__", _computed(f"__{_operator}__"))


class _FloatMark(float):
    """A float marked with the attribute that it comes from; see ``_Mark``."""

    module: str
    name: str


class _Constant(NamedTuple):
    """An attribute that arrives in an op together with tensors.

    Attributes:
        shapes: shapes of the op's tensors.
        mark: the attribute.
    """

    shapes: tuple[tuple[int, ...], ...]
    mark: _FloatMark


class Arrivals(NamedTuple):
    """The attributes that arrive in the ops of a forward.

    Attributes:
        reshapes: reshapes to sizes that are attributes.
        constants: floats that are attributes.
        cuts: numbers from attributes at which dimensions are cut.
    """

    reshapes: Sequence[_Reshape] = ()
    constants: Sequence[_Constant] = ()
    cuts: Sequence[_Mark] = ()


class _Reshape(NamedTuple):
    """A reshape to sizes of which some are attributes.

    Attributes:
        before: shape of the operand.
        after: shape of the result.
        marks: the sizes that are attributes, by dimension of the result.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    marks: dict[int, _Mark]


def arrivals(captured: Capture, numbering: Numbering, records: Records) -> Arrivals:
    """Run the copy with marked attributes, if any of them may follow the channels.

    Args:
        captured: the traced model.
        numbering: the numbers of channels and groups.
        records: the records of the settled interpretation.

    Returns:
        The attributes that arrive in ops.
    """
    source = captured.source
    wanted = any(_counted(source.clone, found, numbering) for found in records.shaped)
    wanted = wanted or any((numbering.channel_of[cut.ids] >= 0).any() for cut in records.cuts)
    if not wanted and not any(_is_free(epsilon, numbering) for epsilon in records.epsilons):
        return Arrivals()
    recorder = _Recorder()
    with _marked(source.clone), recorder:
        for graph in captured.graphs:
            _run_marked(source, graph.training)
    return Arrivals(recorder.reshapes, recorder.constants, recorder.cuts)


def _run_marked(source: SourceOfModel, training: bool) -> None:
    """Run the copy. A forward may refuse marked numbers, and marks that are no keys of its tables.

    The attributes that it has not shown by then stay, and a smaller copy shows which channels need them.
    """
    try:
        source.run(training)
    except Exception:
        _Mark.distinct = False
        with suppress(Exception):
            source.run(training)
    finally:
        _Mark.distinct = True


def _is_free(epsilon: Epsilon, numbering: Numbering) -> bool:
    ids = epsilon.average.ids
    return bool((numbering.channel_of[ids[ids >= 0]] >= 0).any())


def holders(found: Arrivals, records: Records) -> dict[Epsilon, str]:
    """Find the attributes that hold epsilons.

    An attribute of the innermost module comes first. The check of a smaller copy proves the choice.

    Args:
        found: the attributes that arrive in ops.
        records: the records of the settled interpretation.

    Returns:
        The path of the attribute of every epsilon that one holds.
    """
    table: dict[Epsilon, str] = {}
    for epsilon in records.epsilons:
        marks = {
            _path(c.mark): len(c.mark.module)
            for c in found.constants
            if abs(float(c.mark)) == abs(epsilon.number)
            and epsilon.shape in c.shapes
            and _around(epsilon.module, c.mark.module)
        }
        if marks:
            table[epsilon] = max(marks, key=marks.__getitem__)
    return table


def _path(mark: _FloatMark) -> str:
    return f"{mark.module}.{mark.name}" if mark.module else mark.name


def follow(
    captured: Capture,
    tensors: Sequence[Tracked],
    slots: Slots,
    numbering: Numbering,
    records: Records,
    arrived: Arrivals,
) -> None:
    """Find the attributes that count channels and record them in ``Tracked.sizes``.

    Args:
        captured: the traced model.
        tensors: its registered tensors, changed in place.
        slots: all slots.
        numbering: the numbers of channels and groups.
        records: the records of the settled interpretation, with the reshapes.
        arrived: the attributes that arrive in ops.
    """
    source = captured.source
    shaped = [found for found in records.shaped if _counted(source.clone, found, numbering)]
    computed: list[tuple[np.ndarray | None, _Mark]] = []
    fixed: set[Source] = set()
    for reshape in arrived.reshapes:
        for found in shaped:
            if (found.before, found.after) != (reshape.before, reshape.after):
                continue
            for dim, mark in reshape.marks.items():
                ids, sources = found.ids[dim], mark.sources
                if not _around(found.module, sources[0].module):
                    continue
                if len(sources) > 1 or sources[0].value != int(mark):
                    computed += [] if mark.scaled else [(ids, mark)]
                elif ids is None or (numbering.channel_of[ids] < 0).all():
                    fixed.add(sources[0])
                elif not slots.owners(ids):
                    computed.append((ids, mark))
                else:
                    _note(ids, sources[0], tensors, slots, numbering)
    for mark in arrived.cuts:
        computed += [
            (cut.ids, mark)
            for cut in records.cuts
            if cut.number == abs(mark) and _around(cut.module, mark.sources[0].module)
        ]
    finder = Finder(tensors, numbering, fixed)
    # What counts channels comes first: other numbers have to stay what they are then.
    for ids, mark in sorted(computed, key=lambda pair: (pair[0] is None, len(pair[1].sources))):
        finder.fit(ids, mark)


def _around(module: str, outer: str) -> bool:
    return not outer or f"{module}.".startswith(f"{outer}.")


def _counted(model: nn.Module, shaped: Shaped, numbering: Numbering) -> bool:
    """Whether a module around the reshape has an attribute equal to a size or a number of channels in it.

    The size may be computed from the number of channels, as in ``num_heads + 2``.
    """
    channels = [numbering.channel_of[ids] for ids in shaped.ids if ids is not None]
    sizes = {count for own in channels if (own >= 0).any() for count in (len(own), len(set(own[own >= 0])))}
    path = shaped.module.split(".") if shaped.module else []
    around = [".".join(path[:n]) for n in range(len(path) + 1)]
    return any(value in sizes for name in around for _, value in _numbers(model.get_submodule(name)))


def _numbers(module: nn.Module) -> list[tuple[str, int]]:
    """Attributes that may count channels."""
    return [(name, value) for name, value in own_numbers(module).items() if value > 1]


def _note(
    ids: np.ndarray, source: Source, tensors: Sequence[Tracked], slots: Slots, numbering: Numbering
) -> None:
    """Record that an attribute counts ``ids``.

    Nothing is recorded unless each counted index is the same number of indices of one tensor.
    """
    if (ids < 0).any():
        return
    owners = slots.owners(ids)
    if len(owners) != 1:
        return
    number, dim = owners[0]
    tensor = tensors[number]
    whole = tensor.ids[dim]
    if whole is None or len(whole) % len(ids) or any(source.path == known for known, _, _ in tensor.sizes):
        return
    per = len(whole) // len(ids)
    counted, all_of_them = (np.unique(numbering.channel_of[i], return_counts=True) for i in (ids, whole))
    if np.array_equal(counted[0], all_of_them[0]) and np.array_equal(counted[1] * per, all_of_them[1]):
        tensor.sizes = (*tensor.sizes, (source.path, dim, per))


def _marks(given: Any) -> list[_Mark]:
    """The marks among arguments, in lists, tuples and slices."""
    if isinstance(given, _Mark):
        return [given]
    if isinstance(given, slice):
        return _marks((given.start, given.stop))
    return [mark for item in given for mark in _marks(item)] if isinstance(given, (list, tuple)) else []


class _Recorder(TorchFunctionMode):
    """Records the reshapes to sizes that are attributes, and the floats that are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.reshapes: list[_Reshape] = []
        self.constants: list[_Constant] = []
        self.cuts: list[_Mark] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and (name in _RESHAPES or name.removeprefix("new_") in _MADE):
            self._record(name, args, kwargs or {}, result)
        given = (*args, *(kwargs or {}).values())
        if getattr(func, "__name__", "") in _CUTS:
            self.cuts += _marks(given)
        for mark in given:
            if isinstance(mark, _FloatMark):
                shapes = tuple(tuple(t.shape) for t in given if isinstance(t, Tensor))
                self.constants.append(_Constant(shapes, mark))
        return result

    def _record(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """Record a reshape, or a tensor that is made, as one that was without dimensions before."""
        rest = [*args, *kwargs.values()]
        x: Any = rest.pop(0) if name not in _MADE else None
        sizes = pytree.tree_leaves(rest, is_leaf=lambda item: isinstance(item, torch.Size))
        sizes = [s for item in sizes for s in (item if isinstance(item, torch.Size) else [item])]
        first = int(sizes.pop(0)) % x.ndim if name == "unflatten" else 0
        marks = {first + place: size for place, size in enumerate(sizes) if isinstance(size, _Mark)}
        marks = {d: mark for d, mark in marks.items() if d < result.ndim and int(mark) == result.shape[d]}
        if marks:
            before = tuple(x.shape) if name in _RESHAPES else ()
            self.reshapes.append(_Reshape(before, tuple(result.shape), marks))


@contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Mark the attributes of the model that may count channels or be epsilons while the context lasts."""
    restore: list[Callable[[], None]] = []
    for path, module in model.named_modules():
        for name, value in _numbers(module):
            mark = _Mark(value)
            mark.sources = (source := Source(path, name, value),)
            mark.computed = operator.itemgetter(source)
            restore.append(set_number(module, name, mark))
        for name, number in own_floats(module).items():
            constant = _FloatMark(number)
            constant.module, constant.name = path, name
            restore.append(partial(vars(module).__setitem__, name, vars(module)[name]))
            vars(module)[name] = constant
    try:
        yield
    finally:
        for undo in reversed(restore):
            undo()
