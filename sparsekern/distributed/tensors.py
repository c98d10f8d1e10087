"""Tensors that are distributed over processes (DTensor): local parts, whole tensors, and conversion back.

Every function here returns plain tensors unchanged. The module of DTensor is looked up and never imported:
while it is not imported, no tensor is a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparsekern._copying import copied

_TENSORS = "torch.distributed.tensor"
_WRAPPER = "torch.nn.parallel.distributed"


@dataclass(frozen=True)
class Part:
    """Position of a tensor's local part in the whole tensor.

    Attributes:
        dim: the sharded dimension, or None if every process of ``group`` holds the whole tensor.
        start: index of the first local entry along ``dim``.
        size: number of local entries along ``dim``; may be 0.
        parts: number of processes that hold at least one entry.
        group: process group over which the tensor is sharded.
    """

    dim: int | None
    start: int
    size: int
    parts: int
    group: Any


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor, of any placement."""
    module = sys.modules.get(_TENSORS)
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The local part of ``tensor``; it shares memory with ``tensor`` and autograd does not record it."""
    if not is_sharded(tensor):
        return tensor
    # to_local() returns a new object for a parameter, but cached lists compare tensors by identity.
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def wrapped_like(part: Tensor, tensor: Tensor) -> Tensor:
    """Convert a local part to the form of ``tensor``: a DTensor with its placement, or ``part`` itself."""
    if not is_sharded(tensor):
        return part
    made: Tensor = sys.modules[_TENSORS].DTensor.from_local(
        part,
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return made


def same_placement(tensor: Tensor, other: Tensor) -> bool:
    """Whether both tensors are plain, or both are DTensors with the same placements and mesh."""
    if not is_sharded(tensor) or not is_sharded(other):
        return is_sharded(tensor) == is_sharded(other)
    return bool(
        tensor.placements == other.placements  # type: ignore[attr-defined]
        and tensor.device_mesh == other.device_mesh  # type: ignore[attr-defined]
    )


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole ``tensor``, detached. It is gathered, so all processes that hold a part must call this."""
    if not is_sharded(tensor):
        return tensor.detach()
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


@contextmanager
def rewritten(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the whole ``tensor`` for changes in place; on exit write this process's part back.

    All processes that hold a part must enter and make the same changes.
    """
    if not is_sharded(tensor):
        yield tensor
        return
    full = whole(tensor)
    yield full
    with torch.no_grad():
        mine, at = local(tensor), part_of(tensor)
        mine.copy_(full if at.dim is None else full.narrow(at.dim, at.start, at.size))


def part_of(tensor: Tensor) -> Part:
    """The position of a DTensor's local part.

    Raises:
        ValueError: the tensor is sharded along several dimensions of its mesh or in strides, or is a partial
            sum.
    """
    module = sys.modules[_TENSORS]
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = tensor.placements  # type: ignore[attr-defined]
    cuts = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    plain = all(type(placements[axis]) is module.Shard for axis in cuts)
    if len(cuts) > 1 or not plain:
        raise ValueError(
            f"model: got a parameter with the placements {placements}, expected one Shard, and Replicate in "
            f"all other mesh dimensions"
        )
    if not cuts:
        # All processes of the mesh hold the same values. The group of its last dimension represents them.
        return Part(None, 0, 0, 1, mesh.get_group(mesh.ndim - 1))
    axis = cuts[0]
    dim = placements[axis].dim
    size, ranks = tensor.shape[dim], mesh.size(axis)
    # Parts are as in torch.chunk: equal sizes rounded up, so that the last parts may be short or empty.
    chunk = -(-size // ranks)
    start = min(chunk * mesh.get_local_rank(axis), size)
    return Part(dim, start, min(chunk, size - start), -(-size // max(chunk, 1)), mesh.get_group(axis))


def fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of ``mode`` with the shape, strides, dtype and device of the whole ``tensor``."""
    if not is_sharded(tensor):
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made


def check_plain(label: str, tensors: Iterable[tuple[str, Tensor]], why: str) -> None:
    """Check that no tensor is a tensor wrapper.

    Args:
        label: the argument that holds the tensors, for the message.
        tensors: names and tensors.
        why: the reason, which ends the message.

    Raises:
        ValueError: a tensor is a wrapper; names the first one.
    """
    for name, tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"{label}: got a {type(tensor).__name__} as {name!r}, expected plain tensors: {why}"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers of ``torch.compile`` and DistributedDataParallel, in any order."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            module = sys.modules.get(_WRAPPER)
            parallel = module is not None and isinstance(model, module.DistributedDataParallel)
            inner = model.module if parallel else None
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_not_flattened(model: nn.Module) -> None:
    """Check that no module is a FullyShardedDataParallel (FSDP1), which flattens its parameters.

    Raises:
        ValueError: a module is one.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"model: got a FullyShardedDataParallel as {name or 'the model'}, which flattens parameters "
                f"so that they have no channels, expected a model sharded by "
                f"torch.distributed.fsdp.fully_shard"
            )


def check_in_memory(model: nn.Module) -> None:
    """Check that accelerate keeps no parameters elsewhere, to load them for each forward pass.

    Raises:
        ValueError: a module's parameters are elsewhere (``cpu_offload``, ``disk_offload``, ``device_map``).
    """
    for name, module in model.named_modules():
        hook = vars(module).get("_hf_hook")
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            raise ValueError(
                f"model: got one whose {name or 'root'} accelerate loads for each forward pass, expected all "
                f"parameters in memory; load it without offloading"
            )


def settle(model: nn.Module) -> None:
    """Reshard every module that ``fully_shard`` sharded, so that its parameters are the sharded ones.

    After a forward pass without a backward pass, the outermost modules still have gathered parameters.
    """
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def copy_module(
    model: nn.Module, memo: dict[int, Any], result: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """Copy a model as ``copied`` does; the copy's modules lose what ``fully_shard`` added.

    Sharded modules refuse to be copied. Their class, hooks and process groups have no meaning in a copy that
    holds whole tensors.

    Args:
        model: the model.
        memo: copies by ``id`` of the original; must contain copies of all parameters and buffers.
        result: passed on to ``copied``.

    Returns:
        The copy, with the modules' original classes.
    """
    modules = list(model.modules())
    sharded = [module for module in modules if is_fully_sharded(module)]
    if not sharded:
        return copied(model, memo, result)
    contract = sys.modules["torch.distributed._composable.contract"]
    keys = (contract.STATE_KEY, contract.REGISTRY_KEY)
    hooks = [hook for module in modules for held in _hooks(module) for hook in held.values()]
    memo |= {id(hook): _GONE for hook in hooks if _is_fsdp_hook(hook)}
    memo |= {id(module.__dict__[key]): _GONE for module in sharded for key in keys}
    classes = [type(module) for module in sharded]
    try:
        for module in sharded:
            # fully_shard puts one class in front of the module's own.
            module.__class__ = type(module).__mro__[2]
        twin = copied(model, memo, result)
    finally:
        for module, cls in zip(sharded, classes, strict=True):
            module.__class__ = cls
    for module in twin.modules():
        _forget_sharding(module)
    return twin


class _Gone:
    """Placeholder in a copy for entries that are removed from it."""


_GONE = _Gone()
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` sharded the module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    """The non-empty dicts of hooks of a module."""
    return [value for name, value in module.__dict__.items() if name.endswith("_hooks") and value]


def _is_fsdp_hook(hook: Any) -> bool:
    """Whether ``fully_shard`` registered the hook."""
    # torch wraps the hooks of state dicts in another object.
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")


def _forget_sharding(module: nn.Module) -> None:
    """Remove hooks and attributes of ``fully_shard`` from a copied module."""
    for hooks in _hooks(module):
        for key in [key for key, hook in hooks.items() if hook is _GONE]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(key, None)
    for name in [name for name, value in module.__dict__.items() if value is _GONE or name in _MARKS]:
        del module.__dict__[name]
