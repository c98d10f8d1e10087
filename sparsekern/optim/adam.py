"""Adam and AdamW that process row tables in the same pass over memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sparsekern.kernels.options import ADAM
from sparsekern.optim.base import RowOptimizer

_NAMES = ("step", "exp_avg", "exp_avg_sq")
_TOP = "max_exp_avg_sq"


class Adam(RowOptimizer):
    """:class:`torch.optim.Adam` as a fused step that can also process row tables.

    Arguments, defaults, groups and state equal torch's, and state dicts load in both directions. The step is
    always fused: ``foreach`` and ``fused`` are only checked, and ``step`` is on the parameter's device.
    Parameters are dense float32, float64, bfloat16 or float16 tensors. Gradients are dense and have the
    parameter's dtype. Every step reads tensor ``betas`` and therefore waits for their device.

    Raises:
        ValueError: a hyperparameter is out of range, or is a tensor with ``foreach`` and not ``capturable``.
        RuntimeError: ``differentiable`` is set, or ``fused`` and ``foreach`` are both set.
    """

    _OP = ADAM
    _STATE = ("exp_avg", "exp_avg_sq", _TOP, "step")
    _RENAMED: ClassVar = {"beta1": ("betas", 0), "beta2": ("betas", 1), "decoupled": "decoupled_weight_decay"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        _check(lr, betas, eps, weight_decay, tensors_fit=not foreach or capturable)
        defaults = {
            "lr": lr,
            "betas": tuple(_scalar(beta) for beta in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("capturable", False)
            group.setdefault("decoupled_weight_decay", False)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*_NAMES, _TOP) if group["amsgrad"] else _NAMES

    def _new_state(self, name: str, param: Tensor) -> Tensor | None:
        if name == "step":
            return torch.zeros((), dtype=torch.float32, device=param.device)
        return torch.zeros_like(param, memory_format=torch.preserve_format)


class AdamW(Adam):
    """:class:`torch.optim.AdamW` in the form of :class:`Adam`, with decoupled weight decay."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Groups may come from a checkpoint of Adam, or of an AdamW without this key.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


def _check(
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    *,
    tensors_fit: bool,
) -> None:
    """Check the hyperparameters.

    Raises:
        ValueError: one is out of range, or is a tensor while ``tensors_fit`` is False.
    """
    unfit = "as a Tensor is not supported for capturable=False and foreach=True"
    if isinstance(lr, Tensor):
        if not tensors_fit:
            raise ValueError(f"lr {unfit}")
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}, expected >= 0")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}, expected >= 0")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}, expected in [0, 1)")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}, expected >= 0")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if not tensors_fit:
                raise ValueError(f"betas[{i}] {unfit}")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")


def _scalar(value: float | Tensor) -> float | Tensor:
    """A 1-element tensor as a 0-d tensor; a float unchanged."""
    return value.squeeze() if isinstance(value, Tensor) else value
