"""Carrying out a plan: a copy of the user's model whose tensors are smaller from the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsekern.compact.attributes import update_attributes
from sparsekern.compact.load_hooks import forget_listeners
from sparsekern.compact.plan import Plan, TensorPlan, check_shapes, shorten
from sparsekern.distributed.tensors import copy_module, is_sharded, settle, unwrap, whole

# Text, not an object: a pickled compact module then opens without this package.
_PLAN_ATTRIBUTE = "_sparsekern_plan"

# A dimension of size 1 may have any stride, and torch tells the format of a tensor by it: cut many times or
# once, a depthwise weight has to stay what it was.
_FORMATS = {
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}


@dataclass(frozen=True)
class Registered:
    """A parameter or buffer with every name under which the model holds it."""

    tensor: Tensor
    names: tuple[str, ...]
    persistent: bool


def compact(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` that keeps only what ``plan`` keeps; ``model`` stays as it is.

    The copy has the same classes, hooks, attributes, modes, devices, dtypes, memory formats,
    ties and ``requires_grad``, no gradients, and sizes such as ``out_channels`` in line with its
    tensors. Tensors are cut on their way into the copy: the full model is never held twice. The
    copy remembers the plan relative to the model that was never cut (see ``plan_of``), through
    ``copy.deepcopy`` and pickle, so a compact model can be compacted again: by a plan that is
    relative to it, or by one for the model that was never cut, which then says what is left in all.
    Of the result of ``torch.compile`` and of DistributedDataParallel the module inside is copied. The
    copy of a model sharded by ``fully_shard`` is an ordinary whole module on every process: all of
    them have to call this, and gather one tensor at a time.

    Raises ``TypeError`` if ``model`` is not a module or ``plan`` not a plan, ``ValueError`` if the
    plan does not fit the model or a layer's sizes cannot be changed.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: got {type(plan).__name__}, expected a Plan")
    model = unwrap(model)
    tensors = registered(model)
    parts = match(_left_to_do(plan, model, tensors), tensors)
    small = build(model, tensors, parts, lambda entry: cut(entry.tensor, parts[id(entry.tensor)]))
    remember(model, small, tensors, parts)
    return small


def _left_to_do(plan: Plan, model: nn.Module, tensors: list[Registered]) -> Plan:
    """``plan``, or what is left of it where it is for the size that the model had before it was cut."""
    shapes = shapes_of(tensors)
    if all(shapes.get(name, part.shape) == part.shape for name, part in plan.tensors.items()):
        return plan
    try:
        return plan.after(plan_of(model))
    except ValueError:
        return plan  # for another model: its shapes say so best


def plan_of(model: nn.Module) -> Plan:
    """What was removed from ``model``, or from modules inside it, since it was first made."""
    tensors: dict[str, TensorPlan] = {}
    for prefix, module in unwrap(model).named_modules():
        text = module.__dict__.get(_PLAN_ATTRIBUTE)
        if text is not None:
            tensors |= Plan.from_json(text).inside(prefix).tensors
    return Plan(tensors)


def registered(model: nn.Module) -> list[Registered]:
    """The parameters and buffers of ``model``, tied ones once, in the order of registration."""
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
    """The shape of each tensor, by all of its names."""
    return {name: tuple(entry.tensor.shape) for entry in tensors for name in entry.names}


def match(plan: Plan, tensors: list[Registered]) -> dict[int, TensorPlan]:
    """By ``id`` of each tensor, what stays of it. ``ValueError`` if the plan is not for them."""
    check_shapes({name: part.shape for name, part in plan.tensors.items()}, shapes_of(tensors))
    parts = {}
    for entry in tensors:
        named = [(name, plan.tensors[name]) for name in entry.names if name in plan.tensors]
        shape = tuple(entry.tensor.shape)
        for name, part in named:
            if part != named[0][1]:
                raise ValueError(f"plan: {named[0][0]!r} and {name!r} are tied but differ")
        parts[id(entry.tensor)] = named[0][1] if named else TensorPlan(shape)
    return parts


def cut(tensor: Tensor, part: TensorPlan) -> Tensor:
    """What stays of ``tensor``, in memory of its own laid out in the same order of dimensions."""
    tensor = whole(tensor)
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return like(tensor, part, tensor.new_empty_strided)
    order = memory_order(tensor)
    inverse = sorted(range(tensor.ndim), key=order.__getitem__)
    data = tensor.permute(order)
    # The dimension that loses most goes first, so that the other one has least to copy.
    for dim in sorted(part.keep, key=lambda d: len(part.keep[d]) / part.shape[d]):
        indices = torch.from_numpy(part.keep[dim].copy()).to(tensor.device)
        data = data.index_select(inverse[dim], indices)
    if not part.keep:
        data = data.clone(memory_format=torch.contiguous_format)
    # The same memory: only dimensions of size 1 may get another stride.
    return data.as_strided(part.new_shape, _strides(tensor, part))


def like(tensor: Tensor, part: TensorPlan, empty_strided: Callable[..., Tensor]) -> Tensor:
    """An uninitialised tensor with the shape and layout that ``cut`` would give."""
    return empty_strided(
        part.new_shape, _strides(tensor, part), dtype=tensor.dtype, device=tensor.device, requires_grad=False
    )


def _strides(tensor: Tensor, part: TensorPlan) -> tuple[int, ...]:
    """Those of what stays of ``tensor`` when it lies in memory in the same order without gaps."""
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

    ``parts`` says what ``make`` keeps of them.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for entry in tensors:
            memo[id(entry.tensor)] = _as(entry.tensor, make(entry))
        try:
            small = copy_module(model, dict(memo))
        except Exception as error:
            raise ValueError(f"model: {type(model).__name__} cannot be deep-copied: {error}") from error
        for entry in tensors:
            _copy_attributes(entry.tensor, memo[id(entry.tensor)])
    _check_copy(small, tensors, memo)
    forget_listeners(small)
    update_attributes(model, small, parts)
    return small


def remember(
    model: nn.Module,
    small: nn.Module,
    tensors: list[Registered],
    parts: Mapping[int, TensorPlan],
) -> None:
    """Notes on ``small`` what ``parts`` and earlier surgery removed from the model first made."""
    cuts = {e.names[0]: parts[id(e.tensor)] for e in tensors if parts[id(e.tensor)].keep}
    plan = plan_of(model).then(Plan(cuts))
    for module in small.modules():
        module.__dict__.pop(_PLAN_ATTRIBUTE, None)
    if plan.tensors:
        small.__dict__[_PLAN_ATTRIBUTE] = plan.to_json()


def _as(tensor: Tensor, data: Tensor) -> Tensor:
    """``data`` in the role of ``tensor``: parameter or buffer, with or without gradient."""
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
                f"model: {name or 'it'} is a {type(module).__name__}, whose layers cannot be "
                "changed; expected the module before scripting"
            )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"model: {name!r} is not initialised, run the model once")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"model: {name!r} is {tensor.layout}, expected a dense tensor")


def _check_copy(small: nn.Module, tensors: list[Registered], memo: Mapping[int, Any]) -> None:
    expected = {name: memo[id(entry.tensor)] for entry in tensors for name in entry.names}
    found = {name: entry.tensor for entry in registered(small) for name in entry.names}
    wrong = [name for name in expected if found.get(name) is not expected[name]]
    if wrong or found.keys() != expected.keys():
        raise ValueError(
            f"model: {type(small).__name__} does not copy as torch modules do "
            f"({shorten(wrong or sorted(found))}); expected a __deepcopy__ that uses its memo"
        )
