"""The one way to copy a user's module, whatever results of autograd it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def copied(
    model: nn.Module, memo: dict[int, Any] | None = None, result: Callable[[Tensor], Tensor] | None = None
) -> nn.Module:
    """``copy.deepcopy(model, memo)``, also where the model keeps results of autograd.

    ``Tensor.__deepcopy__`` refuses those, wherever a forward has put them: an attribute, a list, a
    dataclass. A copy gets their values without their history; the model keeps both.

    Args:
        model: any module.
        memo: copies that exist already, by ``id``, as ``copy.deepcopy`` takes them.
        result: makes the copy of a result of autograd, from that result without its history; the
            default copies its values.

    Returns:
        The copy. Tensors that are shared in ``model`` are shared in it.
    """
    with _WithoutHistory(result or torch.clone):
        return copy.deepcopy(model, memo)


class _WithoutHistory(TorchFunctionMode):
    """Deep copies of results of autograd are made by ``result``."""

    def __init__(self, result: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._result = result

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            with torch.no_grad():
                memo[id(tensor)] = self._result(tensor.detach())
        return memo[id(tensor)]
