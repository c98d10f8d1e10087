"""Making a compact copy of a model, whose tensors are cut on their way into the copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsekern.compact.attributes import update_attributes
from sparsekern.compact.block_plans import ListPlan, check_counts, kept_of, names_in
from sparsekern.compact.load_hooks import forget_listeners
from sparsekern.compact.plan import Plan, TensorPlan
from sparsekern.compact.plan_checks import check_shapes
from sparsekern.distributed.tensors import copy_module, is_sharded, settle, unwrap, whole
from sparsekern.files.schema import shorten
from sparsekern.graph.containers import containers, keep_blocks
from sparsekern.nn.held_factor import fold_factors, scaled

# The attribute holds JSON text, so a pickled compact module can be loaded without this package.
_PLAN_ATTRIBUTE = "_sparsekern_plan"

# torch derives the memory format from the strides, and a dimension of size 1 may have any stride. A depthwise
# weight must keep its format after any number of cuts.
_FORMATS = {
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}


@dataclass(frozen=True)
class Registered:
    """A parameter or buffer with every name that it has in the model."""

    tensor: Tensor
    names: tuple[str, ...]
    persistent: bool

    def goes(self, plan: Plan) -> bool:
        """Whether the tensor belongs to blocks alone that ``plan`` removes."""
        return names_in(self.names, plan.blocks)


def compact(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller copy of ``model`` with the indices that ``plan`` keeps; ``model`` stays unchanged.

    The copy has the same classes, hooks, attributes, modes, devices, dtypes, memory formats, ties and
    ``requires_grad``. It has no gradients, and sizes such as ``out_channels`` match its tensors. Tensors are
    cut on their way into the copy, so the full model is never held twice.

    The copy remembers the plan relative to the original model (see ``plan_of``), also through
    ``copy.deepcopy`` and pickle. A compact model can therefore be compacted again, either by a plan for its
    present size or by a plan for the original model, which then names everything that stays.

    Args:
        model: the model. The inner module of ``torch.compile`` and ``DistributedDataParallel`` is copied. The
            copy of a model sharded by ``fully_shard`` is an ordinary whole module on every process: all
            processes must make this call, and they gather one tensor at a time.
        plan: a plan for the present or the original size of the model.

    Returns:
        The compact model.

    Raises:
        TypeError: ``model`` is not a module or ``plan`` is not a plan.
        ValueError: the plan does not fit the model, or a layer's sizes cannot be changed.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan")
    model = unwrap(model)
    tensors = registered(model)
    plan = _left_to_do(plan, model, tensors)
    parts = match(plan, tensors)
    check_counts(plan.blocks, lengths(model))

    def made(entry: Registered) -> Tensor:
        part = parts[id(entry.tensor)]
        return placeholder(entry.tensor) if entry.goes(plan) else _fitted(entry.tensor, part)

    small = build(model, tensors, parts, made)
    remove_blocks(small, plan)
    fold_factors(small)
    remember(model, small, tensors, parts, plan.blocks)
    return small


def remove_blocks(model: nn.Module, plan: Plan, undo: ExitStack | None = None) -> None:
    """Remove the blocks that ``plan`` removes from their lists, in place.

    Args:
        model: the model.
        plan: a plan for it.
        undo: receives callbacks that restore the model.

    Raises:
        ValueError: see :func:`sparsekern.graph.containers.keep_blocks`. Nothing has changed.
    """
    if plan.blocks:
        keep_blocks(model, kept_of(plan.blocks), ExitStack() if undo is None else undo)


def lengths(model: nn.Module) -> dict[str, int]:
    """The number of modules in every numbered list of modules, by path."""
    return {path: len(module._modules) for path, module in containers(model).items()}


def placeholder(tensor: Tensor) -> Tensor:
    """A tensor without memory, of the same shape, for one that goes with its block."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _fitted(tensor: Tensor, part: TensorPlan) -> Tensor:
    """The part of ``tensor`` that stays, with values that make up for a mean over fewer channels."""
    data = cut(tensor, part)
    return data if part.factor == 1 else data.copy_(scaled(data, part.factor, part.offset))


def _left_to_do(plan: Plan, model: nn.Module, tensors: list[Registered]) -> Plan:
    """``plan``, or its rest where it is for the original size of a model that was cut already."""
    shapes, sizes, done = shapes_of(tensors), lengths(model), plan_of(model).blocks
    fits = all(sizes.get(path) == part.count for path, part in plan.blocks.items())
    # A plan for the original model also removes the blocks that are gone.
    fits &= not done or not done.keys() <= plan.blocks.keys()
    if fits and all(shapes.get(name, part.shape) == part.shape for name, part in plan.tensors.items()):
        return plan
    try:
        return plan.after(plan_of(model))
    except ValueError:
        return plan  # for another model: the shape check of `match` reports it best


def plan_of(model: nn.Module) -> Plan:
    """The plan of all cuts of ``model`` and its submodules since the model was created."""
    tensors: dict[str, TensorPlan] = {}
    blocks: dict[str, ListPlan] = {}
    for prefix, module in unwrap(model).named_modules():
        text = module.__dict__.get(_PLAN_ATTRIBUTE)
        if text is not None:
            plan = Plan.from_json(text).inside(prefix)
            tensors, blocks = tensors | dict(plan.tensors), blocks | dict(plan.blocks)
    return Plan(tensors, blocks)


def registered(model: nn.Module) -> list[Registered]:
    """The parameters and buffers of ``model`` in the order of registration; tied ones are listed once.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a module is scripted, or a tensor is lazy, quantized or not dense.
    """
    _check_model(model)
    settle(model)
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[Tensor, bool]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            _check_tensor(full, tensor)
            names.setdefault(id(tensor), []).append(full)
            persistent = name not in module._non_persistent_buffers_set
            known = found.get(id(tensor), (tensor, False))[1]
            found[id(tensor)] = (tensor, known or persistent)
    return [Registered(t, tuple(names[key]), kept) for key, (t, kept) in found.items()]


def shapes_of(tensors: list[Registered]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, listed under each of its names."""
    return {name: tuple(entry.tensor.shape) for entry in tensors for name in entry.names}


def match(plan: Plan, tensors: list[Registered]) -> dict[int, TensorPlan]:
    """The part of each tensor that stays, by the tensor's ``id``.

    Raises:
        ValueError: the plan names missing tensors or other shapes, or differs between tied names.
    """
    check_shapes({name: part.shape for name, part in plan.tensors.items()}, shapes_of(tensors))
    parts = {}
    for entry in tensors:
        named = [(name, plan.tensors[name]) for name in entry.names if name in plan.tensors]
        shape = tuple(entry.tensor.shape)
        for name, part in named:
            if part != named[0][1]:
                raise ValueError(
                    f"plan: got different parts of {named[0][0]!r} and {name!r}, expected the same of both, "
                    f"as they are one tensor"
                )
        parts[id(entry.tensor)] = named[0][1] if named else TensorPlan(shape)
    return parts


def cut(tensor: Tensor, part: TensorPlan) -> Tensor:
    """The part of ``tensor`` that stays, in new memory with the same order of dimensions."""
    tensor = whole(tensor)
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return like(tensor, part, tensor.new_empty_strided)
    order = memory_order(tensor)
    inverse = sorted(range(tensor.ndim), key=order.__getitem__)
    data = tensor.permute(order)
    # The dimension that loses the largest share is cut first, so that the next cut copies least.
    for dim in sorted(part.keep, key=lambda d: len(part.keep[d]) / part.shape[d]):
        indices = torch.from_numpy(part.keep[dim].copy()).to(tensor.device)
        data = data.index_select(inverse[dim], indices)
    if not part.keep:
        data = data.clone(memory_format=torch.contiguous_format)
    # The memory stays the same: only dimensions of size 1 may get another stride.
    return data.as_strided(part.new_shape, _strides(tensor, part))


def like(tensor: Tensor, part: TensorPlan, empty_strided: Callable[..., Tensor]) -> Tensor:
    """An uninitialised tensor with the shape and strides of the result of ``cut``."""
    return empty_strided(
        part.new_shape, _strides(tensor, part), dtype=tensor.dtype, device=tensor.device, requires_grad=False
    )


def _strides(tensor: Tensor, part: TensorPlan) -> tuple[int, ...]:
    """The strides of the cut tensor: the same order of dimensions in memory, without gaps."""
    for form in _FORMATS.get(tensor.ndim, ()):
        if torch.empty(tuple(tensor.shape), device="meta", memory_format=form).stride() == tensor.stride():
            return torch.empty(part.new_shape, device="meta", memory_format=form).stride()
    strides = [1] * tensor.ndim
    step = 1
    for dim in reversed(memory_order(tensor)):
        strides[dim] = step
        step *= max(part.new_shape[dim], 1)
    return tuple(strides)


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of ``tensor`` from the outermost in memory to the innermost."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def build(
    model: nn.Module,
    tensors: list[Registered],
    parts: Mapping[int, TensorPlan],
    make: Callable[[Registered], Tensor],
) -> nn.Module:
    """A copy of ``model`` in which ``make`` provides the data of every parameter and buffer.

    Args:
        model: the model to copy.
        tensors: its parameters and buffers.
        parts: the part of each tensor that ``make`` keeps, by the tensor's ``id``.
        make: gives the data of the copy of a tensor.

    Raises:
        ValueError: the model cannot be deep-copied as torch modules are, or sizes of a layer are not known.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for entry in tensors:
            memo[id(entry.tensor)] = _as(entry.tensor, make(entry))
        try:
            small = copy_module(model, dict(memo))
        except Exception as error:
            raise ValueError(
                f"model: got a {type(model).__name__} that copy.deepcopy cannot copy, expected one that it "
                f"can: {error}"
            ) from error
        for entry in tensors:
            _copy_attributes(entry.tensor, memo[id(entry.tensor)])
    _check_copy(small, tensors, memo)
    forget_listeners(small)
    update_attributes(model, small, parts)
    _forget_results(small)
    return small


def _forget_results(small: nn.Module) -> None:
    """Let modules forget what they computed from the weights before the cut.

    A module that keeps such a result for evaluation mode drops it in its own ``train``.
    """
    modes = [(module, module.training) for module in small.modules()]
    for module, _ in modes:
        if type(module).train is not nn.Module.train:
            module.train()
    for module, training in modes:
        module.training = training


def remember(
    model: nn.Module,
    small: nn.Module,
    tensors: list[Registered],
    parts: Mapping[int, TensorPlan],
    blocks: Mapping[str, ListPlan],
) -> None:
    """Store on ``small`` the plan for the original model: earlier cuts, then ``parts`` and ``blocks``."""
    cuts = {e.names[0]: parts[id(e.tensor)] for e in tensors if parts[id(e.tensor)].keep}
    plan = plan_of(model).then(Plan(cuts, blocks))
    forget_plan(small)
    if not plan.removes_nothing or plan.tensors:
        small.__dict__[_PLAN_ATTRIBUTE] = plan.to_json()


def forget_plan(model: nn.Module) -> None:
    """Remove what ``model`` and its submodules know of earlier cuts, in place."""
    for module in model.modules():
        module.__dict__.pop(_PLAN_ATTRIBUTE, None)


def _as(tensor: Tensor, data: Tensor) -> Tensor:
    """``data`` as a parameter or buffer with the ``requires_grad`` of ``tensor``."""
    if isinstance(tensor, nn.Parameter):
        kind = nn.Parameter if is_sharded(tensor) or type(data) is not Tensor else type(tensor)
        return kind(data, tensor.requires_grad)
    return data.requires_grad_(tensor.requires_grad) if tensor.requires_grad else data


def _copy_attributes(tensor: Tensor, new: Tensor) -> None:
    for name, value in ({} if is_sharded(tensor) else tensor.__dict__).items():
        if name not in new.__dict__ and not isinstance(value, Tensor):
            setattr(new, name, copy.copy(value))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: got a {type(module).__name__} as {name or 'the model'}, expected the module before "
                f"scripting, whose layers can be changed"
            )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(
            f"model: got {name!r} without values, expected initialised tensors; run the model once"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"model: got {name!r} of layout {tensor.layout}, expected a dense tensor")


def _check_copy(small: nn.Module, tensors: list[Registered], memo: Mapping[int, Any]) -> None:
    expected = {name: memo[id(entry.tensor)] for entry in tensors for name in entry.names}
    found = {name: entry.tensor for entry in registered(small) for name in entry.names}
    wrong = [name for name in expected if found.get(name) is not expected[name]]
    if wrong or found.keys() != expected.keys():
        raise ValueError(
            f"model: got a {type(small).__name__} whose copy has other tensors "
            f"({shorten(wrong or sorted(found))}), expected a __deepcopy__ that uses its memo"
        )
