"""Cutting a live model in place, with its optimizer state and copies of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from sparsekern.compact.attributes import update_attributes
from sparsekern.compact.block_plans import check_counts
from sparsekern.compact.optimizer_state import StateCutter, drop_parameters, prepare_state
from sparsekern.compact.plan import Plan, TensorPlan
from sparsekern.compact.surgery import (
    Registered,
    cut,
    lengths,
    match,
    registered,
    remember,
    remove_blocks,
)
from sparsekern.compact.transaction import all_or_nothing
from sparsekern.distributed.data_parallel import Rebuilding, check_rebuildable, wrappers_of
from sparsekern.distributed.tensors import check_plain, unwrap
from sparsekern.files.schema import shorten
from sparsekern.nn.held_factor import hold_factor
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

    Modules, parameters, buffers and state tensors stay the same objects and become smaller, so every
    reference to them stays valid. Gradients are cut in the same way. Hooks, ``requires_grad``, memory formats
    and ties stay. Sizes such as ``out_channels`` are updated. ``plan_of`` gives the removed indices. Autograd
    refuses backward passes through earlier outputs, as after any change in place. ``torch.compile`` compiles
    anew at its next call in this process. An exception during the cut leaves everything unchanged. Ctrl-C
    takes effect after the cut.

    Every ``DistributedDataParallel`` of this process that contains the model gets a new reducer with the same
    options and communication hook, so all processes must make the same call. Other hooks on the gradient
    accumulators are lost.

    Args:
        model: the model, possibly wrapped by ``torch.compile`` or ``DistributedDataParallel``.
        plan: a plan for the model in its present size.
        optimizer: the optimizer of the model's parameters, possibly wrapped. State of a parameter's shape, or
            with size 1 in place of some dimensions (as in Adafactor), is cut as the parameter is; single
            numbers stay.
        also: modules of the same structure with their own tensors, bare or inside an ``AveragedModel``.
        state_cutter: cuts optimizer state of any other shape.

    Raises:
        TypeError: ``model``, ``plan`` or an entry of ``also`` has the wrong type.
        ValueError: the plan does not fit, a layer's sizes cannot be changed, tensors are sharded, an entry of
            ``also`` is not a copy of the model, optimizer state of unknown shape exists, or a
            ``DistributedDataParallel`` has a communication hook or an option that depends on sizes. Nothing
            is changed in these cases.
    """
    with all_or_nothing() as undo:
        cut_all(unwrap(model), plan, undo, optimizer=optimizer, also=also, state_cutter=state_cutter)


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
    """Cut as :func:`shrink` does, as a part of a larger transaction.

    Args:
        model: the model without a wrapper.
        plan: see :func:`shrink`.
        undo: receives the callbacks that restore everything.
        optimizer: see :func:`shrink`.
        also: see :func:`shrink`.
        state_cutter: see :func:`shrink`.
        ready: called after all new tensors are made and before anything changes. In a distributed run the
            processes agree there that each of them has prepared its cut.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan")
    live = _Surgery(model, plan, "model")
    copies = _copies_of(live, also)
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
    if optimizer is not None:
        drop_parameters(optimizer, live.removed, undo)
    rebuilding.carry_out()
    forget_compiled()


def check_cuttable(model: nn.Module) -> None:
    """Check the conditions of :func:`shrink` that hold for every plan.

    Args:
        model: the model, possibly wrapped.

    Raises:
        ValueError: a tensor is sharded, or a ``DistributedDataParallel`` wrapper cannot be rebuilt.
    """
    inner = unwrap(model)
    _check_whole(registered(inner), "model")
    for wrapper in wrappers_of(inner):
        check_rebuildable(wrapper)


def check_copies(model: nn.Module, plan: Plan, also: Sequence[nn.Module]) -> list[dict[int, TensorPlan]]:
    """Check that every entry of ``also`` has copies of the tensors named in ``plan``.

    Args:
        model: the model, possibly wrapped.
        plan: a plan for the model in its present size.
        also: the copies, bare or inside a wrapper such as an ``AveragedModel``.

    Returns:
        For each copy, the part of each tensor that ``plan`` keeps, by the tensor's ``id``.

    Raises:
        TypeError: ``also`` is a module itself, or an entry is not a module.
        ValueError: an entry is not a copy of the model.
    """
    if not listed(also):
        return []
    return [copied.parts for copied in _copies_of(_Surgery(unwrap(model), plan, "model"), also)]


class _Surgery:
    """A plan for one module. The constructor checks it; ``prepare`` and ``carry_out`` follow in turn."""

    def __init__(self, module: nn.Module, plan: Plan, label: str) -> None:
        self.plan = plan
        self.tensors = registered(module)
        self.parts = match(plan, self.tensors)
        self.names = {id(entry.tensor): entry.names[0] for entry in self.tensors}
        self.module = module
        self.removed = [entry.tensor for entry in self.tensors if entry.goes(plan)]
        self._smaller: list[tuple[Tensor, Tensor, Tensor | None]] = []
        _check_whole(self.tensors, label)
        check_counts(plan.blocks, lengths(module))
        with _attributes_restored(module), ExitStack() as undo:
            update_attributes(module, module, self.parts)
            remove_blocks(module, plan, undo)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the smaller tensors and gradients; the module stays unchanged."""
        for entry in self.tensors:
            part = self.parts[id(entry.tensor)]
            if part.keep:
                grad = entry.tensor.grad if entry.tensor.is_leaf else None
                # Gradients of other kinds (sparse ones, or the placeholder of a consumed one) are dropped.
                plain = type(grad) is Tensor and grad.layout is torch.strided
                kept = cut(grad, part) if plain and grad is not None else None
                self._smaller.append((entry.tensor, cut(entry.tensor, part), kept))

    def carry_out(self, undo: ExitStack) -> None:
        """Cut the module; ``undo`` receives the callbacks that restore it."""
        undo.callback(_restore_attributes, _attributes(self.module))
        update_attributes(self.module, self.module, self.parts)
        hold_factors(self.module, self.module, self.parts)
        remember(self.module, self.module, self.tensors, self.parts, self.plan.blocks)
        remove_blocks(self.module, self.plan, undo)
        for tensor, data, grad in self._smaller:
            undo.callback(_assign, tensor, tensor.data, tensor.grad if tensor.is_leaf else None)
            _assign(tensor, data, grad)
            # Autograd does not notice an assignment to `data`, so the version marks saved tensors as changed.
            increment_version(tensor)


def hold_factors(model: nn.Module, copy: nn.Module, parts: Mapping[int, TensorPlan]) -> None:
    """Let modules make up for means over fewer channels; see :mod:`sparsekern.nn.held_factor`.

    The parameters keep their values: the optimizer's state and all later steps are the masked network's.

    Args:
        model: the model before the cut.
        copy: the cut model with the same module structure; may be ``model`` itself.
        parts: the part of each tensor of ``model`` that stays, by the tensor's ``id``.
    """
    for before, after in zip(model.modules(), copy.modules(), strict=True):
        for name, tensor in before._parameters.items():
            part = None if tensor is None else parts.get(id(tensor))
            if part is not None and part.factor != 1:
                hold_factor(after, name, part.factor, part.offset)


def listed(also: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """The copies in ``also``.

    Raises:
        TypeError: ``also`` is a module itself; some modules are sequences of their own submodules.
    """
    if isinstance(also, nn.Module):
        raise TypeError(f"also: got a {type(also).__name__}, expected a sequence of modules; pass [model]")
    return tuple(also)


def _copies_of(live: _Surgery, also: Sequence[nn.Module]) -> list[_Surgery]:
    """The same surgery for every copy of the model in ``also``.

    Raises:
        TypeError, ValueError: see :func:`check_copies`.
    """
    return [_copy_of(module, live, f"also[{index}]") for index, module in enumerate(listed(also))]


def _copy_of(module: object, live: _Surgery, label: str) -> _Surgery:
    """The same surgery for a copy of the model; the copy may be wrapped."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{label}: got {type(module).__name__}, expected an nn.Module")
    for candidate in _candidates(module):
        tensors = registered(candidate)
        known = {name for entry in tensors for name in entry.names}
        if known.issuperset(live.plan.tensors):
            if any(id(entry.tensor) in live.parts for entry in tensors):
                raise ValueError(
                    f"{label}: got a module that shares tensors with the model, expected a copy of the model"
                )
            try:
                return _Surgery(candidate, live.plan, label)
            except ValueError as error:
                raise ValueError(
                    f"{label}: got a module of other sizes, expected a copy of the model as it is now: "
                    f"{error}"
                ) from None
    missing = sorted(live.plan.tensors.keys() - known)
    raise ValueError(
        f"{label}: got a {type(unwrap(module)).__name__} without {shorten(missing)}, expected a copy of the "
        f"model"
    )


def inside(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """The module with tensors of all ``names``: ``module`` itself, or the module that it wraps."""
    wanted = set(names)
    return next(
        candidate
        for candidate in _candidates(module)
        if wanted.issubset(name for entry in registered(candidate) for name in entry.names)
    )


def _candidates(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    own = unwrap(module)
    # AveragedModel and the distributed wrappers keep the inner model in the attribute `module`.
    within = getattr(own, "module", None)
    return own, unwrap(within) if isinstance(within, nn.Module) else own


def _check_whole(tensors: Sequence[Registered], label: str) -> None:
    check_plain(
        label,
        ((entry.names[0], entry.tensor) for entry in tensors),
        "sharded and other wrapped ones cannot be cut in place (fully_shard fixes the sizes of its parts; "
        "pruner.reshard(shard) makes a smaller model instead)",
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
    """Restore the attributes and classes of all modules at the end of the block, also after an exception."""
    before = _attributes(module)
    try:
        yield
    finally:
        _restore_attributes(before)


def _assign(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give ``tensor`` data and a gradient of another size; it stays the same object."""
    if tensor.is_leaf:
        tensor.grad = None
    if tensor.requires_grad:
        # A hook or an old graph keeps the tensor's gradient accumulator alive, and the accumulator expects
        # the old shape. torch drops it when data of another dtype is assigned.
        other = torch.float32 if tensor.dtype is torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    if grad is not None:
        tensor.grad = grad


def forget_compiled() -> None:
    """Drop the code that torch.compile made for the old shapes.

    Old code never fits again but counts towards the recompile limit, beyond which torch.compile runs eagerly.
    """
    from torch._dynamo import reset_code_caches

    reset_code_caches()
