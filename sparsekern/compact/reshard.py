"""A smaller model in place of one that ``fully_shard`` sharded, with its optimizer's state.

:class:`SmallerModel` makes it without memory, lets a function of the user shard it, and then moves the values
of one tensor at a time, each of which frees its old memory. A process cuts its own part and sends what is
left of it, so that it holds one part of one tensor more than its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekern.compact.plan import Plan, TensorPlan
from sparsekern.compact.shrink import forget_compiled, hold_factors
from sparsekern.compact.surgery import Registered, build, cut, match, registered, remember
from sparsekern.distributed import fully_sharded
from sparsekern.distributed.pieces import overlap, sent, spans
from sparsekern.distributed.tensors import (
    is_fully_sharded,
    is_sharded,
    local,
    part_of,
    same_placement,
    unwrap,
    wrapped_like,
)
from sparsekern.files.schema import shorten
from sparsekern.optim import Unwrapped

Shard = Callable[[nn.Module], nn.Module | None]
"""Shards a model by ``fully_shard``, as the user has sharded the first one; returns None or the model."""


class SmallerModel:
    """A copy of a sharded model that becomes what a plan leaves of it.

    Call :meth:`shard`, and then :meth:`move` once all processes have succeeded.

    Attributes:
        module: the copy; its sharded parameters have no memory before :meth:`move`.
        plan: the plan.
    """

    def __init__(self, model: nn.Module, plan: Plan, optimizer: Unwrapped) -> None:
        """Make the copy; ``model`` stays unchanged.

        Args:
            model: the model without a wrapper.
            plan: a plan for its present size.
            optimizer: the optimizer inside its wrappers.

        Raises:
            ValueError: ``fully_shard`` did not shard the model, gradients are not summed yet, the plan does
                not fit, or optimizer state does not follow the shape and the division of its parameter.
        """
        check_fully_sharded(model)
        fully_sharded.check_reduced(model)
        self.plan, self._model, self._optimizer = plan, model, optimizer
        self._tensors = registered(model)
        self._parts = match(plan, self._tensors)
        check_state(optimizer, self._tensors)

        def make(entry: Registered) -> Tensor:
            tensor, part = entry.tensor, self._parts[id(entry.tensor)]
            return (
                torch.empty(part.new_shape, dtype=tensor.dtype, device="meta")
                if is_sharded(tensor)
                else cut(tensor, part)
            )

        self.module = build(model, self._tensors, self._parts, make)
        hold_factors(model, self.module, self._parts)
        remember(model, self.module, self._tensors, self._parts, plan.blocks)
        self._new: dict[str, Tensor] = {}

    def shard(self, shard: Shard) -> nn.Module:
        """Let ``shard`` divide the copy; return its result, or the copy where that is None.

        Raises:
            ValueError: the result is another model, or tensors are others or divided in another way than
                ``fully_shard`` divides them.
        """
        given = shard(self.module)
        result = self.module if given is None else given
        if not isinstance(result, nn.Module) or unwrap(result) is not self.module:
            raise ValueError(
                f"shard: got a {type(given).__name__} from it, expected None or the model that it was given, "
                f"possibly compiled"
            )
        self._new = {name: entry.tensor for entry in registered(self.module) for name in entry.names}
        expected = [name for entry in self._tensors for name in entry.names]
        if other := sorted(self._new.keys() ^ set(expected)):
            raise ValueError(
                f"shard: got a model with other tensors ({shorten(other)}), expected it to shard the model "
                f"that it is given, and to change nothing else"
            )
        recorded = fully_sharded.records(self.module)
        for entry in self._tensors:
            self._check_sharded(entry, recorded)
        parts = [part_of(tensor) for tensor in self._new.values() if is_sharded(tensor)]
        meshes = {tuple(dist.get_process_group_ranks(part.group)) for part in parts if part.dim is not None}
        if len(meshes) > 1:
            raise ValueError(
                f"shard: got parameters sharded over different processes {sorted(meshes)}, expected one "
                f"device mesh"
            )
        return result

    def _check_sharded(self, entry: Registered, recorded: dict[int, Any]) -> None:
        name, part = entry.names[0], self._parts[id(entry.tensor)]
        made = self._new[name]
        if any(self._new[other] is not made for other in entry.names):
            raise ValueError(f"shard: got {shorten(entry.names)} as several tensors, expected one")
        if tuple(made.shape) != part.new_shape or made.dtype != entry.tensor.dtype:
            raise ValueError(
                f"shard: got {name!r} as {made.dtype} {list(made.shape)}, expected {entry.tensor.dtype} "
                f"{list(part.new_shape)}"
            )
        if made.is_meta and id(made) not in recorded:
            raise ValueError(
                f"shard: got a model whose {name!r} is not sharded, expected it to be, as in the model before"
            )

    def division(self) -> list[str]:
        """How each tensor is divided, as text that is equal in all processes if they did the same."""
        divided = ((name, tensor) for name, tensor in self._new.items() if is_sharded(tensor))
        return [
            f"{name}: {tensor.placements} of {tensor.device_mesh}"  # type: ignore[attr-defined]
            for name, tensor in divided
        ]

    @torch.no_grad()
    def move(self) -> None:
        """Move the values, gradients and optimizer state of one tensor after the other.

        The former model has no weights afterwards, and its forward passes raise. The optimizer stays the same
        object, with the same groups; its parameters and its state are those of the smaller model.
        """
        fully_sharded.retire(self._model)
        former, recorded = fully_sharded.records(self._model), fully_sharded.records(self.module)
        replaced: dict[int, Tensor] = {}
        for entry in self._tensors:
            old, new = entry.tensor, self._new[entry.names[0]]
            if not isinstance(old, nn.Parameter):
                continue
            assert isinstance(new, nn.Parameter)
            replaced[id(old)] = new
            part, grad = self._parts[id(old)], old.grad
            if is_sharded(old):
                held = divided(old, part, new, partial(fully_sharded.empty, old, former[id(old)]))
                fully_sharded.fill(new, held, recorded[id(new)])
                del held
            self._move_state(old, part, new)
            old.grad = None
            if grad is not None and grad.layout is torch.strided:
                new.grad = _moved(grad, part, new)
        for params in self._groups():
            params[:] = [replaced.get(id(param), param) for param in params]
        forget_compiled()

    def _move_state(self, old: nn.Parameter, part: TensorPlan, new: nn.Parameter) -> None:
        for states in self._optimizer.states:
            if old in states:
                values = states.pop(old)
                for name, value in values.items():
                    if isinstance(value, Tensor) and _follows(value, old):
                        values[name] = _moved(value, part, new)
                states[new] = values

    def _groups(self) -> Iterator[list[Tensor]]:
        """The lists of parameters in the groups of the optimizer, its parts and its wrappers, each once."""
        held = (getattr(holder, "param_groups", ()) for holder in self._optimizer.holders)
        lists = [group["params"] for groups in held for group in groups]
        yield from {id(params): params for params in lists}.values()


def check_fully_sharded(model: nn.Module) -> None:
    """Check that ``fully_shard`` sharded the model, or modules of it.

    Raises:
        ValueError: it did not.
    """
    if not any(map(is_fully_sharded, model.modules())):
        raise ValueError(
            f"model: got a {type(model).__name__} that fully_shard has not sharded, expected a sharded one; "
            f"pruner.shrink() and shrink=True cut any other in place"
        )


def check_state(optimizer: Unwrapped, tensors: list[Registered]) -> None:
    """Check that the optimizer's state can move: it is divided like its parameter, or a single number.

    Raises:
        ValueError: other state exists, or the optimizer divides its parameters among others.
    """
    kind = type(optimizer.optimizer).__name__
    if optimizer.parts:
        raise ValueError(
            f"optimizer: got a {kind}, which divides its parameters among {len(optimizer.parts)} other "
            f"optimizers, expected one that updates all of its parameters itself"
        )
    for entry in tensors:
        for values in (states[entry.tensor] for states in optimizer.states if entry.tensor in states):
            for name, value in values.items():
                single = not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
                if isinstance(value, Tensor):
                    single = _follows(value, entry.tensor) or (value.numel() == 1 and not is_sharded(value))
                if not single:
                    raise ValueError(
                        f"optimizer: got a {kind} whose state {name!r} of parameter {entry.names[0]!r} "
                        f"{list(entry.tensor.shape)} is {_described(value)}, expected a tensor divided like "
                        f"the parameter, or a number; a state_cutter is not used here"
                    )


def _follows(value: Tensor, param: Tensor) -> bool:
    """Whether state has the shape and the division of its parameter."""
    return value.shape == param.shape and same_placement(value, param)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a {'divided' if is_sharded(value) else 'whole'} tensor of shape {list(value.shape)}"


def _moved(value: Tensor, part: TensorPlan, new: nn.Parameter) -> Tensor:
    """What ``part`` keeps of state or of a gradient, divided like the parameter ``new``; frees ``value``."""
    return wrapped_like(divided(value, part, new, partial(fully_sharded.empty, value)), new)


def divided(tensor: Tensor, part: TensorPlan, like: Tensor, free: Callable[[], None]) -> Tensor:
    """This process's part of what ``part`` keeps of ``tensor``, if it is divided like ``like``.

    The processes of ``tensor`` all have to call this. Each holds the part of one other meanwhile.

    Args:
        tensor: a whole tensor, or a DTensor of any division.
        part: the part that stays.
        like: a tensor of the new shape; only its division counts.
        free: frees the memory of ``tensor``, a DTensor; called when this process has cut its own part.

    Returns:
        A plain tensor.
    """
    if not part.keep and same_placement(tensor, like):
        same = local(tensor).detach()
        if is_sharded(tensor):
            free()
        return same
    target = part_of(like) if is_sharded(like) else None
    shape = list(part.new_shape)
    if target is not None and target.dim is not None:
        shape[target.dim] = target.size
    own = _Own(tensor, part)
    if is_sharded(tensor):
        free()
    made = own.piece.new_empty(shape)
    for piece, dim, start in own.pieces():
        view, where = overlap(piece, dim, start, target)
        made[where].copy_(view)
    return made


class _Own:
    """The cut piece of this process, and those of the others in turn.

    Attributes:
        piece: what stays of the local part, without a reference to the tensor before the cut.
    """

    def __init__(self, tensor: Tensor, part: TensorPlan) -> None:
        at = part_of(tensor) if is_sharded(tensor) else None
        self._at = None if at is None or at.dim is None else at
        if at is None or at.dim is None:
            self.piece = cut(local(tensor), part)
            return
        kept = part.keep.get(at.dim, np.arange(part.shape[at.dim]))
        self._bounds = np.searchsorted(kept, spans(at, part.shape[at.dim])).tolist()
        self._shape = part.new_shape
        self.piece = _cut_part(local(tensor), part, at.dim, at.start, kept)

    def pieces(self) -> Iterator[tuple[Tensor, int, int]]:
        """Each piece, the dimension along which it is one, and its first index in the cut tensor."""
        if self._at is None or self._at.dim is None:
            yield self.piece, 0, 0
            return
        dim = self._at.dim
        shapes = [
            tuple(stop - start if d == dim else size for d, size in enumerate(self._shape))
            for start, stop in self._bounds
        ]
        for rank, piece in sent(self.piece, shapes, self._at.group):
            yield piece, dim, self._bounds[rank][0]


def _cut_part(mine: Tensor, part: TensorPlan, dim: int, start: int, kept: np.ndarray) -> Tensor:
    """What ``part`` keeps of a local part that begins at index ``start`` of dimension ``dim``."""
    here = kept[(kept >= start) & (kept < start + mine.shape[dim])] - start
    if not len(here):
        shape = [0 if d == dim else size for d, size in enumerate(part.new_shape)]
        return mine.new_empty(shape)
    keep = {**part.keep, dim: here}
    own = TensorPlan(tuple(mine.shape), keep)
    # The tensor object before the cut is emptied, so that another one has to refer to its memory.
    return cut(mine, own) if own.keep else mine.detach().contiguous()
