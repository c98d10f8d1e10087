"""Tensors that are spread over processes (DTensor): their local part, the whole of them, and the way back.

Plain tensors go through every function here unchanged. The module of DTensor is looked up and never
imported: where nobody has imported it, no tensor is one.
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
    """Where the local part of a tensor lies in the whole.

    Attributes:
        dim: the dimension that is cut, or None where every process of ``group`` holds the whole.
        start: index of the first local entry along ``dim``.
        size: number of local entries along ``dim``; may be 0.
        parts: number of processes that hold any.
        group: the processes that the tensor is cut over.
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
    """What this process holds of ``tensor``, sharing memory with it and no part of autograd."""
    if not is_sharded(tensor):
        return tensor
    # Not to_local(): that makes a new object for a parameter, and lists are kept by identity.
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def wrapped_like(part: Tensor, tensor: Tensor) -> Tensor:
    """A local part in the form of ``tensor``: a DTensor placed in the same way, or ``part`` itself."""
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
    """Whether both are plain, or both cut in the same way over the same processes."""
    if not is_sharded(tensor) or not is_sharded(other):
        return is_sharded(tensor) == is_sharded(other)
    return bool(
        tensor.placements == other.placements  # type: ignore[attr-defined]
        and tensor.device_mesh == other.device_mesh  # type: ignore[attr-defined]
    )


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, detached; gathered from the processes that hold it, which all have to call this."""
    if not is_sharded(tensor):
        return tensor.detach()
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full


@contextmanager
def rewritten(tensor: Tensor) -> Iterator[Tensor]:
    """All of ``tensor`` to be changed in place; afterwards this process keeps its part of it.

    All processes that hold a part have to enter, and to make the same changes.
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
    """Where the local part of a DTensor lies.

    Raises:
        ValueError: it is cut along more than one dimension of its mesh, in an interleaved way, or is a
            partial sum.
    """
    module = sys.modules[_TENSORS]
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Sequence[Any] = tensor.placements  # type: ignore[attr-defined]
    cuts = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    plain = all(type(placements[axis]) is module.Shard for axis in cuts)
    if len(cuts) > 1 or not plain:
        raise ValueError(f"model: a parameter is placed as {placements}, expected one Shard, else Replicate")
    if not cuts:
        # All processes of the mesh hold the same; the group of its last dimension stands for them.
        return Part(None, 0, 0, 1, mesh.get_group(mesh.ndim - 1))
    axis = cuts[0]
    dim = placements[axis].dim
    size, ranks = tensor.shape[dim], mesh.size(axis)
    # As torch.chunk cuts: equal parts rounded up, so that the last ones may be short or empty.
    chunk = -(-size // ranks)
    start = min(chunk * mesh.get_local_rank(axis), size)
    return Part(dim, start, min(chunk, size - start), -(-size // max(chunk, 1)), mesh.get_group(axis))


def fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """The whole of ``tensor`` without memory, as a tensor of ``mode``."""
    if not is_sharded(tensor):
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made


def check_plain(label: str, tensors: Iterable[tuple[str, Tensor]], why: str) -> None:
    """Raise a ValueError for the first of the named tensors that wraps other ones; ``why`` ends its text."""
    for name, tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(f"{label}: {name!r} is a {type(tensor).__name__}, expected plain tensors: {why}")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` and DistributedDataParallel return, in any order."""
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
    """No module is a FullyShardedDataParallel (FSDP1), whose parameters are flattened into others.

    Raises:
        ValueError: one is.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"model: {name or 'it'} is a FullyShardedDataParallel, which flattens parameters into one "
                f"without channels, expected a model sharded by torch.distributed.fsdp.fully_shard"
            )


def settle(model: nn.Module) -> None:
    """Make every module sharded by ``fully_shard`` show its sharded parameters.

    After a forward pass without a backward pass the outermost ones still show gathered ones.
    """
    for module in model.modules():
        if _is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def copy_module(
    model: nn.Module, memo: dict[int, Any], result: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """``copied(model, memo, result)``; modules sharded by ``fully_shard`` become what they were before.

    Those refuse to be copied, and what makes them sharded (their class, hooks, the processes they know)
    means nothing for a copy that holds whole tensors. ``memo`` has to hold the copies of all parameters and
    buffers.
    """
    modules = list(model.modules())
    sharded = [module for module in modules if _is_fully_sharded(module)]
    if not sharded:
        return copied(model, memo, result)
    contract = sys.modules["torch.distributed._composable.contract"]
    keys = (contract.STATE_KEY, contract.REGISTRY_KEY)
    hooks = [hook for module in modules for held in _hooks(module) for hook in held.values()]
    memo |= {id(hook): _GONE for hook in hooks if _of_fsdp(hook)}
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
    """Stands in a copy for what is to be taken out of it."""


_GONE = _Gone()
_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def _is_fully_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [value for name, value in module.__dict__.items() if name.endswith("_hooks") and value]


def _of_fsdp(hook: Any) -> bool:
    # The hooks of state dicts are wrapped once more by torch.
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")


def _forget_sharding(module: nn.Module) -> None:
    for hooks in _hooks(module):
        for key in [key for key, hook in hooks.items() if hook is _GONE]:
            del hooks[key]
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(key, None)
    for name in [name for name, value in module.__dict__.items() if value is _GONE or name in _MARKS]:
        del module.__dict__[name]
