"""The records that ``fully_shard`` (FSDP2) keeps of its parameters: filled, emptied and checked.

torch fixes the size of a parameter's parts when it shards a module, and offers no way to change them. A
smaller model is therefore sharded while its parameters have no memory (on the device ``meta``). Here each of
them gets its values, and each parameter of the former model gives its memory back.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state

from sparsekern.distributed.tensors import is_fully_sharded, local, wrapped_like


def records(model: nn.Module) -> dict[int, Any]:
    """The records of all sharded parameters of ``model``, by the parameter's ``id``."""
    found: dict[int, Any] = {}
    for module in filter(is_fully_sharded, model.modules()):
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        # torch before 2.11 has one group for each module.
        groups = (
            state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        )
        for group in groups:
            if group is not None:
                found |= {id(record.sharded_param): record for record in group.fsdp_params}
    return found


def check_reduced(model: nn.Module) -> None:
    """Check that no gradient waits for its sum over the processes, as after a backward pass without it.

    Raises:
        ValueError: one waits.
    """
    for record in records(model).values():
        gathered = getattr(record, "_unsharded_param", None)
        if record.unsharded_accumulated_grad is not None or (
            gathered is not None and gathered.grad is not None
        ):
            raise ValueError(
                "model: got gradients that are not summed over the processes yet "
                "(set_requires_gradient_sync(False)), expected a call between optimizer.zero_grad() and the "
                "next backward pass"
            )


@torch.no_grad()
def fill(param: nn.Parameter, part: Tensor, record: Any) -> None:
    """Give a sharded parameter without memory its local part.

    Args:
        param: a DTensor on the device ``meta``; stays the same object.
        part: the local part, used without a copy where the record needs no padding.
        record: its record.
    """
    real = nn.Parameter(wrapped_like(part, param), param.requires_grad)
    vars(real).update(vars(param))
    torch.utils.swap_tensors(param, real)
    record.reset_sharded_param()


@torch.no_grad()
def empty(tensor: Tensor, record: Any = None) -> None:
    """Free the memory of a DTensor's local part, whoever refers to the tensor.

    Args:
        tensor: a DTensor, unusable afterwards.
        record: the record of ``tensor``, if it is a parameter.
    """
    part = local(tensor)
    # A storage of no bytes would crash whoever reads the old size; a tensor of no elements raises.
    part.data = part.new_empty(0)
    if record is not None:
        record._sharded_param_data = part


def retire(model: nn.Module) -> None:
    """Let every forward pass of ``model`` raise a RuntimeError, before ``fully_shard`` gathers anything."""
    for module in (model, *filter(is_fully_sharded, model.modules())):
        module.register_forward_pre_hook(_refuse, prepend=True)


def stand_for(former: nn.Module, model: nn.Module) -> None:
    """Let ``former`` be ``model`` for everyone who refers to it, such as a trainer's loop.

    Both objects have the same dictionary of attributes from here on: modules, parameters, hooks, mode.

    Args:
        former: a module that ``fully_shard`` sharded, and whose place ``model`` has taken.
        model: another one of the same class.
    """
    object.__setattr__(former, "__dict__", model.__dict__)
    # fully_shard remembers its state by the module.
    states = _composable_state._module_state_mapping
    states[former] = states[model]


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "model: got a forward pass of the model before pruner.reshard(), whose weights have moved, expected "
        "one of the model that reshard() returned"
    )
