"""Sizes that may change in an exported network: how they are traced, and others to check the file with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.courses import first_line

KINDS = ("batch", "size")
# Strides that are tried where the user gives none.
STRIDES = (1, 2, 4, 8, 16, 32, 64, 128)
# Batch size of the check, unlike that of any trace.
OTHER_BATCH = 3

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


@dataclass(frozen=True)
class Sizes:
    """How a network is traced and checked.

    Attributes:
        traced: the arguments to trace with. A dimension of size 1 would be fixed, so there is none among
            the dynamic ones.
        dynamic_shapes: as for ``torch.export.export``; None for fixed sizes.
        checked: arguments on which the file has to equal torch; the example comes first.
        larger: arguments of larger sizes by stride, of which those of one stride have to equal torch, too.
            Empty for fixed sizes.
        text: the dynamic sizes in words, for messages.
    """

    traced: Example
    dynamic_shapes: Any
    checked: tuple[Example, ...]
    larger: Mapping[int, Example]
    text: str


def check_dynamic(dynamic: object) -> tuple[str, ...]:
    """The dynamic sizes, in the order of ``KINDS``.

    Raises:
        ValueError: ``dynamic`` is neither a bool nor one or more of ``KINDS``.
    """
    if isinstance(dynamic, bool):
        return KINDS if dynamic else ()
    items = [dynamic] if isinstance(dynamic, str) else dynamic
    if not isinstance(items, (list, tuple, set, frozenset)) or not all(item in KINDS for item in items):
        raise ValueError(
            f"dynamic: got {dynamic!r}, expected True, False, or some of {', '.join(map(repr, KINDS))}"
        )
    return tuple(kind for kind in KINDS if kind in items)


def find_sizes(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Sequence[str],
    stride: int | None,
) -> Sizes:
    """The sizes to trace and to check a network with.

    Args:
        network: the network in evaluation mode; it runs at other sizes, to see that it can.
        args: positional arguments of the example.
        kwargs: keyword arguments of the example.
        dynamic: some of ``KINDS``.
        stride: sizes are multiples of it; None to search for it.

    Raises:
        ValueError: the example has no such dimensions, or the network does not run at another size.
    """
    if stride is not None and (type(stride) is not int or stride < 1):
        raise ValueError(f"stride: got {stride!r}, expected a whole number >= 1, or None")
    example: Example = (args, dict(kwargs))
    tensors = _tensors(example)
    if not tensors:
        raise ValueError("example_inputs: got no tensor, expected at least one")
    batch = next((t.shape[0] for t in tensors if t.ndim), None) if "batch" in dynamic else None
    if "batch" in dynamic and batch is None:
        raise ValueError("dynamic: got 'batch', expected inputs with a batch dimension; pass dynamic=False")
    if "size" in dynamic and not any(t.ndim >= 4 for t in tensors):
        raise ValueError(
            f"dynamic: got 'size', expected an input with at least 4 dimensions, not "
            f"{', '.join(str(list(t.shape)) for t in tensors)}; pass dynamic='batch'"
        )
    checked, traced, larger = [example], example, dict[int, Example]()
    if batch is not None:
        traced = _changed(example, batch, max(2, batch), 0)
        other = OTHER_BATCH if traced is example or batch != OTHER_BATCH else OTHER_BATCH + 1
        checked.append(_changed(example, batch, other, 0))
        _run(
            network, checked[-1], f"dynamic: got 'batch', expected a network that runs on a batch of {other}"
        )
    if "size" in dynamic:
        larger = _larger(network, checked[-1], stride)
        traced = _grown(traced, min(larger))
    shapes = _shapes(network, example, batch, "size" in dynamic) if dynamic else None
    return Sizes(traced, shapes, tuple(checked), larger, " and ".join(dynamic) or "none")


def _tensors(example: Example) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]


def _larger(network: nn.Module, example: Example, given: int | None) -> dict[int, Example]:
    """The example with larger height and width for every stride at which the network runs."""
    found, problem = {}, ""
    for stride in STRIDES if given is None else (given,):
        larger = _changed(example, None, None, stride)
        try:
            _run(network, larger, "")
            found[stride] = larger
        except ValueError as error:
            problem = str(error)
    if not found:
        tried = f"a multiple of {given}" if given else f"any multiple of {STRIDES[-1]} or less"
        raise ValueError(
            f"dynamic: got 'size', expected a network that runs on a larger size, {tried}{problem}"
            "; pass dynamic='batch' for a network of one size"
        )
    return found


def _run(network: nn.Module, example: Example, message: str) -> None:
    try:
        with torch.no_grad():
            network(*example[0], **example[1])
    except Exception as error:
        raise ValueError(f"{message} ({first_line(error)})") from error


def _changed(example: Example, batch: int | None, other: int | None, step: int) -> Example:
    """The example with another batch size, and sizes that grow by ``step``, twice as much for the last one.

    Values come from the example, so that indices stay in their range.
    """

    def change(tensor: Tensor) -> Tensor:
        if batch is not None and tensor.ndim and tensor.shape[0] == batch and other is not None:
            tensor = _take(tensor, 0, other)
        if step and tensor.ndim >= 4:
            for dim in range(2, tensor.ndim):
                more = step * (2 if dim == tensor.ndim - 1 else 1)
                tensor = _take(tensor, dim, tensor.shape[dim] + more)
        return tensor

    changed: Example = pytree.tree_map_only(Tensor, change, example)
    return changed


def _grown(example: Example, step: int) -> Example:
    """The example with sizes of at least 2: those of size 1 would be fixed in a trace."""
    small = any(size < 2 for t in _tensors(example) if t.ndim >= 4 for size in t.shape[2:])
    return _changed(example, None, None, step) if small else example


def _take(tensor: Tensor, dim: int, size: int) -> Tensor:
    """``size`` slices of the tensor along ``dim``, shifted, so that slices of a batch differ."""
    length = tensor.shape[dim]
    index = torch.arange(size, device=tensor.device)
    taken = tensor.index_select(dim, index % length)
    if dim == 0 and tensor.ndim > 1 and tensor.shape[-1] > 1:
        rows = [torch.roll(row, number // length, -1) for number, row in enumerate(taken.unbind(0))]
        taken = torch.stack(rows)
    return taken


def _shapes(network: nn.Module, example: Example, batch: int | None, size: bool) -> dict[str, Any]:
    """Dynamic shapes of the arguments, by the names of the forward's parameters."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dims: dict[int, Any] = {}
        if batch is not None and leaf.ndim and leaf.shape[0] == batch:
            dims[0] = Dim.AUTO
        if size and leaf.ndim >= 4:
            dims |= {dim: Dim.AUTO for dim in range(2, leaf.ndim)}
        return dims or None

    bound = inspect.signature(network.forward).bind(*example[0], **example[1]).arguments
    return {name: pytree.tree_map(of, value) for name, value in bound.items()}
