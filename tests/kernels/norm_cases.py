"""Data for batch normalisations with their activation, and the comparison of a backend with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from kernels.tolerance import assert_elementwise
from torch import Tensor

from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# One element per channel and row, runs shorter than a vector, several blocks, channels that fill no vector.
SHAPES = [(3, 5, 1, 1), (2, 3, 3, 5), (4, 24, 6, 6), (2, 64, 9, 11), (3, 7, 50, 47), (1, 130, 4, 4)]

# Tolerance relative to the largest element: a float32 sum has several rounding errors, a bfloat16 result one.
ROUNDINGS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@dataclass
class NormProblem:
    """The arguments of one forward and one backward pass."""

    x: Tensor
    grad: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor]
    mask: Tensor | None
    counts: ChannelCounts | None
    options: dict[str, Any]

    @property
    def inputs(self) -> NormInputs:
        return NormInputs(self.x, self.residual, self.weight, self.bias, self.mask)

    def forward(self, backend: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = backend.norm_act_forward(
            self.inputs, Running(*self.running), NormOptions(**self.options)
        )
        return found

    def backward(self, backend: ModuleType, mean: Tensor, var: Tensor) -> list[Tensor | None]:
        """The four gradients, and then the arrays of the counts."""
        counts = self.counts
        if counts is not None:
            counts = ChannelCounts.of([array.clone() for array in counts.arrays], counts.tau, counts.decay)
        options = NormOptions(**self.options)
        grads = backend.norm_act_backward(self.grad, self.inputs, Moments(mean, var), options, counts)
        return [*grads, *([] if counts is None else counts.arrays)]


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory: str,
    activation: str = "relu",
    *,
    residual: bool = False,
    masked: float = 0.0,
    training: bool = True,
    affine: bool = True,
    seed: int = 0,
) -> NormProblem:
    """Random data. Masked channels hold NaN and infinities, because no kernel may use their values."""
    generator = torch.Generator().manual_seed(seed)

    def data(offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + offset
        return values.to(dtype).contiguous(memory_format=FORMATS[memory])

    def vector(low: float, high: float) -> Tensor:
        values = torch.rand(shape[1], generator=generator, dtype=torch.float64) * (high - low) + low
        return values.to(reference_norm.compute_dtype(x))

    x, grad = data(3.0), data()
    mask = None
    weight, bias = (vector(-2, 2), vector(-2, 4)) if affine else (None, None)
    if masked:
        mask = torch.rand(shape[1], generator=generator) < masked
        x[:, mask] = torch.nan
    return NormProblem(
        x=x,
        grad=grad,
        residual=data() if residual else None,
        weight=weight,
        bias=bias,
        running=(vector(-1, 1), vector(0.5, 2)),
        mask=mask,
        counts=ChannelCounts(vector(0, 2).float(), vector(0, 1).float(), torch.tensor([3.0]), 1.5, 0.9),
        options={"activation": activation, "training": training, "eps": 1e-5},
    )


def assert_equals_reference(backend: ModuleType, given: NormProblem) -> None:
    """Both passes of `backend` equal the reference, given the same mean and variance."""
    got, want = given.forward(backend), given.forward(reference_norm)
    near = ROUNDINGS[given.x.dtype]
    for name, mine, theirs in zip(("y", "mean", "var"), got, want, strict=True):
        _assert_near(name, mine, theirs, near if name == "y" else min(near, 2e-6))
    assert got[0].stride() == given.x.stride()
    mean, var = want[1:]
    grads = zip(given.backward(backend, mean, var), given.backward(reference_norm, mean, var), strict=True)
    names = ("grad_x", "grad_residual", "grad_weight", "grad_bias", "threshold", "activity", "updates")
    for name, (mine, theirs) in zip(names, grads, strict=False):
        if theirs is None:
            assert mine is None, name
            continue
        assert mine is not None, name
        if name == "grad_x":
            assert mine.stride() == given.x.stride()
        _assert_near(name, mine, theirs, near if name.startswith("grad_") else 2e-6)


def _assert_near(name: str, mine: Tensor, theirs: Tensor, near: float) -> None:
    assert mine.dtype == theirs.dtype, name
    largest = theirs.double().abs().nan_to_num(0, 0, 0).max().item()
    assert_elementwise(name, mine, theirs, near * max(largest, 1e-30))
