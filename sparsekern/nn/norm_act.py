"""Batch normalisation and its activation as one module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.norm_checks import check_activation
from sparsekern.kernels.norm_ops import norm_act
from sparsekern.kernels.options import NormInputs, NormOptions, Running

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": partial(F.relu, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "silu": partial(F.silu, inplace=True),
}


class NormAct2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with its activation: ``activation(norm(x) + residual)``.

    Parameters, buffers, keys of the state dict and numerics equal torch's. The forward and the backward pass
    each read the data twice. Only ``x`` and the residual are saved for the backward pass, which recomputes
    the input of the activation.

    ``mask`` and ``counts`` are training state: copies, pickles and state dicts do not contain them.

    Attributes:
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        mask: bool ``[C]``, True for channels whose gamma and beta are 0, or None. These channels are not
            computed: their result is ``activation(residual)``, they get no gradient, and their running
            statistics do not change.
        counts: receives each channel's gradient counts in backward passes, or None.
    """

    activation: str
    mask: Tensor | None = None
    counts: ChannelCounts | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "relu",
    ) -> None:
        """Create the module.

        Args:
            num_features: number of channels. This and the arguments up to ``dtype`` are as in
                ``torch.nn.BatchNorm2d``.
            eps: added to the variance.
            momentum: weight of a batch in the running statistics; None for a cumulative average.
            affine: whether to have a weight and a bias.
            track_running_stats: whether to keep running statistics.
            device: of the parameters and buffers.
            dtype: of the parameters and buffers.
            activation: see the attribute.

        Raises:
            ValueError: ``activation`` is unknown.
        """
        check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation

    @staticmethod
    def adopt(norm: nn.BatchNorm2d, activation: str) -> None:
        """Convert torch's module to this class in place; the object and its tensors stay the same.

        Args:
            norm: the module.
            activation: see the attribute.

        Raises:
            ValueError: the class of ``norm`` is not ``torch.nn.BatchNorm2d``, or ``activation`` is unknown.
        """
        if type(norm) is not nn.BatchNorm2d:
            raise ValueError(f"norm: got a {type(norm).__name__}, expected a BatchNorm2d")
        check_activation(activation)
        norm.__class__ = NormAct2d
        norm.__dict__["activation"] = activation
        norm.__dict__["_adopted"] = True

    @staticmethod
    def release(norm: nn.Module) -> None:
        """Undo :meth:`adopt`; other modules stay unchanged."""
        if not norm.__dict__.pop("_adopted", False):
            return
        for name in ("activation", "mask", "counts"):
            norm.__dict__.pop(name, None)
        norm.__class__ = nn.BatchNorm2d

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("mask", "counts")}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise, add the residual and apply the activation.

        Args:
            x: ``[N, C, H, W]``.
            residual: a tensor like ``x`` that is added before the activation, or None.

        Returns:
            A tensor with the shape and dtype of ``x``.

        Raises:
            ValueError: ``x`` does not have 4 dimensions, or has one value per channel in training.
        """
        self._check_input_dim(x)
        # Dynamo of torch 2.11 takes is_exporting() for true in torch.compile, too. It guards this flag.
        if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
            # Readers of exported graphs know only torch's operators.
            z = super().forward(x)
            return _IN_PLACE[self.activation](z if residual is None else z + residual)
        weight, bias, running_mean, running_var, batches = self._tensors()
        training = self.training
        options = NormOptions(
            self.activation,
            training or running_mean is None,
            self.eps,
            self._momentum(batches) if training else 0.0,
        )
        inputs = NormInputs(x, residual, weight, bias, self.mask)
        y = norm_act(inputs, Running(running_mean, running_var), options, self.counts)
        if training and batches is not None:
            batches.add_(1)
        return y

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, running mean, running variance and the number of batches.

        They are read from torch's dicts directly, because five calls of ``__getattr__`` take longer than
        the kernel of a small layer.
        """
        parameters, buffers = self._parameters, self._buffers
        try:
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            )
        except KeyError:
            # The tensor is an attribute instead, as after torch.nn.utils.parametrize.
            return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _momentum(self, batches: Tensor | None) -> float:
        """The weight of this batch in the running statistics after ``batches`` batches."""
        if batches is None:
            return 0.0
        return 1.0 / (float(batches) + 1) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FusedActivation(nn.Identity):
    """Identity in place of an activation that a :class:`NormAct2d` computes."""

    _original: type[nn.Module]

    @staticmethod
    def adopt(activation: nn.Module) -> None:
        """Convert the module to this class in place."""
        activation.__dict__["_original"] = type(activation)
        activation.__class__ = FusedActivation

    @staticmethod
    def release(activation: nn.Module) -> None:
        """Undo :meth:`adopt`."""
        activation.__class__ = activation.__dict__.pop("_original")

    def extra_repr(self) -> str:
        return self._original.__name__
