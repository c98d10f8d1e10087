"""Carrying out a plan on the live model: the same objects, smaller, with their optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from sparsekern.compact.attributes import update_attributes
from sparsekern.compact.optimizer_state import StateCutter, prepare_state
from sparsekern.compact.plan import Plan, TensorPlan, shorten
from sparsekern.compact.surgery import Registered, cut, match, registered, remember
from sparsekern.compact.transaction import all_or_nothing
from sparsekern.distributed.data_parallel import Rebuilding, check_rebuildable, wrappers_of
from sparsekern.distributed.tensors import check_plain, unwrap
from sparsekern.optim import Unwrapped


def shrink(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: Optimizer | Unwrapped | None = None,
    also: Sequence[nn.Module] = (),
    state_cutter: StateCutter | None = None,
) -> None:
    """Cut ``model`` in place to what ``plan`` keeps, with the optimizer's state and copies of the model.

    Modules, parameters, buffers and state tensors stay the same objects and become smaller: whoever
    holds them sees it. Gradients are cut alike; hooks, ``requires_grad``, memory formats and ties
    stay; sizes such as ``out_channels`` follow; ``plan_of`` knows what is gone. Backward passes
    through outputs from before are refused by autograd afterwards, as after any change in place.
    What ``torch.compile`` has compiled in this process is compiled anew at its next call. Whatever raises
    meanwhile leaves everything as it was, and Ctrl-C waits until everything is smaller.

    Every ``DistributedDataParallel`` of this process that the model is inside of gets a new reducer, with
    its options and its communication hook: all processes have to call this alike. Other hooks on the
    gradient accumulators themselves do not follow.

    Args:
        model: also the result of ``torch.compile`` and ``DistributedDataParallel``.
        plan: relative to the model as it is.
        optimizer: of parameters of the model, also inside of a wrapper. State of a parameter's shape, or
            with size 1 in place of some dimensions (Adafactor's), is cut as the parameter is; single numbers
            stay.
        also: modules of the same structure with tensors of their own, as they are or inside an
            ``AveragedModel``.
        state_cutter: gives the smaller state where the optimizer keeps some of another shape.

    Raises:
        TypeError: ``model``, ``plan`` or an entry of ``also`` is something else.
        ValueError: the plan does not fit, a layer's sizes cannot be changed, tensors are sharded, an
            entry of ``also`` is no copy, there is state whose cut is not known, or a
            ``DistributedDataParallel`` has a communication hook or an option that knows of sizes. Nothing
            has been changed in all these cases.
    """
    with all_or_nothing() as undo:
        cut_all(model, plan, undo, optimizer=optimizer, also=also, state_cutter=state_cutter)


def cut_all(
    model: nn.Module,
    plan: Plan,
    undo: ExitStack,
    *,
    optimizer: Optimizer | Unwrapped | None = None,
    also: Sequence[nn.Module] = (),
    state_cutter: StateCutter | None = None,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """As :func:`shrink`, as a part of a larger change.

    Args:
        undo: is told what restores everything.
        ready: called when all that is new has been made, and before the first thing changes; several
            processes agree there that each of them has got so far.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan")
    live = _Surgery(unwrap(model), plan, "model")
    copies = [_copy_of(module, live, f"also[{index}]") for index, module in enumerate(also)]
    state = None
    if optimizer is not None:
        state = prepare_state(optimizer, live.parts, live.names, state_cutter)
    wrappers = wrappers_of(live.module)
    for wrapper in wrappers:
        check_rebuildable(wrapper)
    for surgery in (live, *copies):
        surgery.prepare()
    ready()
    rebuilding = Rebuilding(wrappers, undo)
    for surgery in (live, *copies):
        surgery.carry_out(undo)
    if state is not None:
        state.carry_out(undo)
    rebuilding.carry_out()
    _forget_compiled()


def check_cuttable(model: nn.Module) -> None:
    """Raise what :func:`shrink` would for every plan: sharded tensors, or a wrapper that cannot follow."""
    inner = unwrap(model)
    _check_whole(registered(inner), "model")
    for wrapper in wrappers_of(inner):
        check_rebuildable(wrapper)


def check_copies(model: nn.Module, plan: Plan, also: Sequence[nn.Module]) -> list[dict[int, TensorPlan]]:
    """Raise what :func:`shrink` would if an entry of ``also`` is no copy of the tensors named in ``plan``.

    Returns:
        For each copy, by ``id`` of its tensors, what ``plan`` leaves of them.
    """
    if not also:
        return []
    live = _Surgery(unwrap(model), plan, "model")
    return [_copy_of(module, live, f"also[{index}]").parts for index, module in enumerate(also)]


class _Surgery:
    """A plan for one module: checked when it is made, then prepared, then carried out."""

    def __init__(self, module: nn.Module, plan: Plan, label: str) -> None:
        self.plan = plan
        self.tensors = registered(module)
        self.parts = match(plan, self.tensors)
        self.names = {id(entry.tensor): entry.names[0] for entry in self.tensors}
        self.module = module
        self._smaller: list[tuple[Tensor, Tensor, Tensor | None]] = []
        _check_whole(self.tensors, label)
        with _attributes_restored(module):
            update_attributes(module, module, self.parts)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make what stays of the tensors and of their gradients; changes nothing."""
        for entry in self.tensors:
            part = self.parts[id(entry.tensor)]
            if part.keep:
                grad = entry.tensor.grad if entry.tensor.is_leaf else None
                # Other kinds of gradient (sparse, or the stand-in for one that is used up) are not kept.
                plain = type(grad) is Tensor and grad.layout is torch.strided
                kept = cut(grad, part) if plain and grad is not None else None
                self._smaller.append((entry.tensor, cut(entry.tensor, part), kept))

    def carry_out(self, undo: ExitStack) -> None:
        """Change the module; ``undo`` is told what restores it."""
        undo.callback(_restore_attributes, _attributes(self.module))
        update_attributes(self.module, self.module, self.parts)
        remember(self.module, self.module, self.tensors, self.parts)
        for tensor, data, grad in self._smaller:
            undo.callback(_assign, tensor, tensor.data, tensor.grad if tensor.is_leaf else None)
            _assign(tensor, data, grad)
            # Assigning data does not tell autograd that a saved tensor has changed.
            increment_version(tensor)


def _copy_of(module: object, live: _Surgery, label: str) -> _Surgery:
    """The same surgery for a copy of the model, which may be wrapped."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{label}: got {type(module).__name__}, expected an nn.Module")
    for candidate in _candidates(module):
        tensors = registered(candidate)
        known = {name for entry in tensors for name in entry.names}
        if known.issuperset(live.plan.tensors):
            if any(id(entry.tensor) in live.parts for entry in tensors):
                raise ValueError(f"{label}: shares tensors with the model, expected a copy of it")
            try:
                return _Surgery(candidate, live.plan, label)
            except ValueError as error:
                raise ValueError(f"{label}: not a copy of the model as it is: {error}") from None
    missing = sorted(live.plan.tensors.keys() - known)
    raise ValueError(
        f"{label}: got a {type(unwrap(module)).__name__} without {shorten(missing)}, expected a copy of the "
        f"model"
    )


def inside(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """The copy of the model that ``module`` is or wraps: it has tensors of all these names."""
    wanted = set(names)
    return next(
        candidate
        for candidate in _candidates(module)
        if wanted.issubset(name for entry in registered(candidate) for name in entry.names)
    )


def _candidates(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    own = unwrap(module)
    # AveragedModel and the wrappers for several processes call what is inside `module`.
    within = getattr(own, "module", None)
    return own, unwrap(within) if isinstance(within, nn.Module) else own


def _check_whole(tensors: Sequence[Registered], label: str) -> None:
    check_plain(
        label,
        ((entry.names[0], entry.tensor) for entry in tensors),
        "sharded and other wrapped ones cannot be cut in place (fully_shard fixes the sizes of its parts)",
    )


_Attributes = list[tuple[nn.Module, type[nn.Module], dict[str, Any]]]


def _attributes(module: nn.Module) -> _Attributes:
    return [(part, type(part), dict(part.__dict__)) for part in module.modules()]


def _restore_attributes(before: _Attributes) -> None:
    for part, kind, values in before:
        part.__class__ = kind
        for name in part.__dict__.keys() - values.keys():
            del part.__dict__[name]
        part.__dict__.update(values)


@contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """The attributes and classes of all modules as they were, when the block is left in any way."""
    before = _attributes(module)
    try:
        yield
    finally:
        _restore_attributes(before)


def _assign(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give ``tensor``, which stays the same object, data and a gradient of another size."""
    if tensor.is_leaf:
        tensor.grad = None
    if tensor.requires_grad:
        # A node that accumulates gradients lives as long as a hook or an old graph holds on to it,
        # and expects the shape it was made for. Assigning another dtype makes torch forget it.
        other = torch.float32 if tensor.dtype is torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    if grad is not None:
        tensor.grad = grad


def _forget_compiled() -> None:
    """Drop what torch.compile made for other shapes: it would never fit again, but count as a recompile,
    and after a few of them torch.compile gives up and runs eagerly."""
    from torch._dynamo import reset_code_caches

    reset_code_caches()
