"""Batch normalisation with its activation: forward and backward passes of a layer, against eager torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.bench.cases import Case
from sparsekern.bench.check import differing
from sparsekern.bench.comparison import OURS, Contest
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.nn import NormAct2d

EAGER = "torch eager"

# Of the largest element: sums in another order, and in bfloat16 a rounding between norm and activation.
ROUNDINGS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Data:
    """The shape ``[N, C, H, W]`` that a layer gets, and how it lies."""

    shape: tuple[int, int, int, int]
    memory_format: torch.memory_format = torch.contiguous_format


LAYERS: dict[str, Data] = {
    f"{'x'.join(map(str, shape))}{suffix}": Data(shape, memory)
    for shape in ((8, 64, 128, 128), (8, 16, 128, 128))
    for suffix, memory in (("", torch.contiguous_format), ("-channels-last", torch.channels_last))
}


class _Layer:
    """A norm and what follows it, with data and the gradient of what it gives."""

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
        """Of one forward pass, whichever time it is."""
        if self._y is None:
            self._y = self.forward()
        wanted = (self.x, self.norm.weight, self.norm.bias)
        return torch.autograd.grad(self._y, wanted, self.grad, retain_graph=True)


def norm_act(case: Case, *, backward: bool) -> Contest:
    """``NormAct2d`` that counts gradients against torch's norm and ReLU that do not.

    Right is what gives torch's outputs and gradients in float64, to rounding.
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
    sides: dict[str, Callable[[], object]] = {}
    for name, layer in ((OURS, mine), (EAGER, theirs)):
        sides[name] = layer.backward if backward else layer.forward
    size = mine.x.numel() * mine.x.element_size()
    # Input and output once; backward the gradients of both, and the input.
    moved = dict.fromkeys(sides, size * (3 if backward else 2))
    return Contest(sides, moved, mine.x.numel(), functools.partial(_wrong, mine, theirs, ours.mask))


def _wrong(mine: _Layer, theirs: _Layer, mask: Tensor | None) -> str | None:
    near = ROUNDINGS[mine.x.dtype]
    # Channels-last, torch's own sums in float32 are further off than this.
    theirs = copy.deepcopy(theirs)
    theirs.norm.double()
    theirs.x, theirs.grad = mine.x.detach().double().requires_grad_(), mine.grad.double()
    got, want = mine.backward(), theirs.backward()
    # A masked channel's gamma and beta stay zero, so it has no gradient of them.
    if mask is not None:
        want = (want[0], *(torch.where(mask, 0, grad) for grad in want[1:]))
    assert mine._y is not None and theirs._y is not None
    names = ("y", "gradient of x", "gradient of weight", "gradient of bias")
    for name, one, other in zip(names, (mine._y.detach(), *got), (theirs._y.detach(), *want), strict=True):
        if text := differing(name, one, other, near * other.double().abs().max()):
            return text
    return None
