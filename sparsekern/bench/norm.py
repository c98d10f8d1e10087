"""Batch normalisation with activation: forward and backward passes of a layer, against eager torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.bench.cases import Case
from sparsekern.bench.comparison import OURS, Comparison
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.selfcheck.comparison import differing
from sparsekern.nn import NormAct2d

EAGER = "torch eager"

# Allowed difference over the largest element: sums are added in another order, and half precision also rounds
# between norm and activation.
ROUNDINGS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Data:
    """Shape ``[N, C, H, W]`` and memory format of a layer's input."""

    shape: tuple[int, int, int, int]
    memory_format: torch.memory_format = torch.contiguous_format


LAYERS: dict[str, Data] = {
    f"{'x'.join(map(str, shape))}{suffix}": Data(shape, memory)
    for shape in ((8, 64, 128, 128), (8, 16, 128, 128))
    for suffix, memory in (("", torch.contiguous_format), ("-channels-last", torch.channels_last))
}


class _Layer:
    """A norm and its activation, with an input and the gradient of the output."""

    def __init__(self, case: Case, norm: nn.BatchNorm2d, after: nn.Module) -> None:
        data, device = LAYERS[case.tensors], torch.device(case.device)
        generator = torch.Generator().manual_seed(0)

        def noise() -> Tensor:
            values = torch.randn(data.shape, generator=generator)
            return values.to(device, case.dtype).contiguous(memory_format=data.memory_format)

        self.x, self.grad = noise().requires_grad_(), noise()
        self.norm = norm.to(device)
        self.after = after
        self._y: Tensor | None = None

    def forward(self) -> Tensor:
        y: Tensor = self.after(self.norm(self.x))
        return y

    def backward(self) -> tuple[Tensor, ...]:
        """The gradients of input, weight and bias. All calls share one forward pass."""
        if self._y is None:
            self._y = self.forward()
        wanted = (self.x, self.norm.weight, self.norm.bias)
        return torch.autograd.grad(self._y, wanted, self.grad, retain_graph=True)


def norm_act(case: Case, *, backward: bool) -> Comparison:
    """``NormAct2d`` that counts gradients, against torch's norm and ReLU.

    The result is right if outputs and gradients equal torch's in float64, to rounding.

    Args:
        case: the case.
        backward: whether the backward pass is timed instead of the forward pass.
    """
    channels = LAYERS[case.tensors].shape[1]
    ours = NormAct2d(channels)
    mine, theirs = _Layer(case, ours, nn.Identity()), _Layer(case, nn.BatchNorm2d(channels), nn.ReLU())
    ours.counts = ChannelCounts.zeros(channels, torch.device(case.device))
    if case.masked:
        ours.mask = torch.arange(channels, device=case.device) < case.masked * channels
        with torch.no_grad():
            for norm in (mine.norm, theirs.norm):
                norm.weight[ours.mask] = 0
                norm.bias[ours.mask] = 0
    candidates: dict[str, Callable[[], object]] = {}
    for name, layer in ((OURS, mine), (EAGER, theirs)):
        candidates[name] = layer.backward if backward else layer.forward
    size = mine.x.numel() * mine.x.element_size()
    # Forward reads the input and writes the output; backward reads input and output gradient and writes the
    # input gradient.
    moved = dict.fromkeys(candidates, size * (3 if backward else 2))
    return Comparison(
        candidates, moved, mine.x.numel(), functools.partial(_mismatch, mine, theirs, ours.mask)
    )


def _mismatch(mine: _Layer, theirs: _Layer, mask: Tensor | None) -> str | None:
    near = ROUNDINGS[mine.x.dtype]
    # The reference runs in float64: torch's float32 sums in channels-last exceed this tolerance.
    theirs = copy.deepcopy(theirs)
    theirs.norm.double()
    theirs.x, theirs.grad = mine.x.detach().double().requires_grad_(), mine.grad.double()
    got, want = mine.backward(), theirs.backward()
    # Gamma and beta of a masked channel stay zero, so their gradients are zero.
    if mask is not None:
        want = (want[0], *(torch.where(mask, 0, grad) for grad in want[1:]))
    assert mine._y is not None and theirs._y is not None
    names = ("y", "gradient of x", "gradient of weight", "gradient of bias")
    for name, one, other in zip(names, (mine._y.detach(), *got), (theirs._y.detach(), *want), strict=True):
        if text := differing(name, one, other, near * other.double().abs().max()):
            return text
    return None
