"""Stochastic gradient descent that processes row tables in the same pass over memory."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparsekern.kernels.options import SGD as SGD_OP
from sparsekern.optim.base import RowOptimizer

_BUFFER = "momentum_buffer"


class SGD(RowOptimizer):
    """:class:`torch.optim.SGD` as a fused step that can also process row tables.

    Arguments, defaults, groups and state equal torch's, and state dicts load in both directions. The step is
    always fused: ``foreach`` and ``fused`` are only checked. Parameters are dense float32, float64, bfloat16
    or float16 tensors. Gradients are dense and have the parameter's dtype.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: ``differentiable`` is set, or ``fused`` and ``foreach`` are both set.
    """

    _OP = SGD_OP
    _STATE = (_BUFFER,)
    _RENAMED: ClassVar = {"first": None}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}, expected >= 0")
        if not momentum >= 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}, expected >= 0")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}, expected >= 0")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (_BUFFER,) if group["momentum"] != 0 else ()

    def _new_state(self, name: str, param: Tensor) -> Tensor | None:
        # The first step creates the buffer from the gradient without dampening.
        return None
