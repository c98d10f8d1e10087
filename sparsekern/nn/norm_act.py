"""Batch normalisation and the activation behind it, as one module."""

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

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": partial(F.relu, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "silu": partial(F.silu, inplace=True),
}


class NormAct2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with its activation: ``activation(norm(x) + residual)``.

    Parameters, buffers, keys of the state dict and numerics are torch's. Forward and backward pass go
    twice over the data each, and keep ``x`` alone for the backward pass (with a residual, that too),
    from which the input of the activation is computed again.

    ``mask`` and ``counts`` belong to a training: copies, pickles and state dicts have neither.

    Attributes:
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        mask: bool ``[C]`` or None; channels whose gamma and beta are 0, which are not computed: their
            result is ``activation(residual)``, they get no gradient, and their running statistics stand
            still.
        counts: where backward passes count the gradients of each channel, or None.
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
        """All but ``activation`` as in ``torch.nn.BatchNorm2d``.

        Raises:
            ValueError: an activation that does not exist.
        """
        check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation

    @staticmethod
    def adopt(norm: nn.BatchNorm2d, activation: str) -> None:
        """Make torch's module one of these, in place: the same tensors and object.

        Raises:
            ValueError: another class than ``torch.nn.BatchNorm2d``, or an activation that does not exist.
        """
        if type(norm) is not nn.BatchNorm2d:
            raise ValueError(f"norm: got a {type(norm).__name__}, expected a BatchNorm2d")
        check_activation(activation)
        norm.__class__ = NormAct2d
        norm.__dict__["activation"] = activation
        norm.__dict__["_adopted"] = True

    @staticmethod
    def release(norm: nn.Module) -> None:
        """The inverse of :meth:`adopt`; a module that was never torch's stays what it is."""
        if not norm.__dict__.pop("_adopted", False):
            return
        for name in ("activation", "mask", "counts"):
            norm.__dict__.pop(name, None)
        norm.__class__ = nn.BatchNorm2d

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("mask", "counts")}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]``, and the same for ``residual``; the result is like ``x``.

        Raises:
            ValueError: other dimensions, or one value per channel in training.
        """
        self._check_input_dim(x)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            # What reads exported graphs knows torch's operators.
            z = super().forward(x)
            return _IN_PLACE[self.activation](z if residual is None else z + residual)
        weight, bias, running_mean, running_var, batches = self._tensors()
        training = self.training
        y = norm_act(
            x,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            self.mask,
            self.counts,
            activation=self.activation,
            training=training or running_mean is None,
            eps=self.eps,
            momentum=self._momentum(batches) if training else 0.0,
        )
        if training and batches is not None:
            batches.add_(1)
        return y

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, running mean and variance, and the number of batches.

        Straight from where torch keeps them: five attributes by way of ``__getattr__`` take longer than a
        small layer's kernel.
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
            # Something has put attributes of its own there, as torch.nn.utils.parametrize does.
            return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def _momentum(self, batches: Tensor | None) -> float:
        """The share of this batch in the running statistics, after so many."""
        if batches is None:
            return 0.0
        return 1.0 / (float(batches) + 1) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FusedActivation(nn.Identity):
    """Stands where an activation stood that :class:`NormAct2d` has taken over."""

    _original: type[nn.Module]

    @staticmethod
    def adopt(activation: nn.Module) -> None:
        """Put one in the place of the module, in the same object."""
        activation.__dict__["_original"] = type(activation)
        activation.__class__ = FusedActivation

    @staticmethod
    def release(activation: nn.Module) -> None:
        """The inverse of :meth:`adopt`."""
        activation.__class__ = activation.__dict__.pop("_original")

    def extra_repr(self) -> str:
        return self._original.__name__
