"""Small problems for batch normalisations with their activation, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.activations import compute_dtype
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running
from sparsekern.kernels.selfcheck.comparison import differing

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# One element per channel and row, runs shorter than a vector, several blocks, channels that fill no vector.
SHAPES = [(3, 5, 1, 1), (2, 3, 3, 5), (4, 24, 6, 6), (2, 64, 9, 11), (3, 7, 50, 47), (1, 130, 4, 4)]

# Of one element per channel and outer index; odd; packs that fit; long planes, whole and in pieces; many
# outer indices; several blocks for each channel, in both layouts; more channels than a tile has.
LARGE = [
    (5, 7, 1, 1),
    (3, 5, 3, 7),
    (2, 16, 4, 4),
    (2, 3, 61, 67),
    (2, 2, 67, 131),
    (700, 3, 2, 1),
    (3, 1, 53, 59),
    (37, 40, 7, 9),
    (5, 264, 3, 3),
]

# Tolerance relative to the largest element: a float32 sum has several rounding errors, a bfloat16 result one.
ROUNDINGS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-10}

LAYOUTS = ("contiguous_format", "channels_last", "permuted", "not aligned")
"""Memory layouts of the data, for :func:`laid_out`."""


@dataclass
class NormProblem:
    """The arguments of one forward and one backward pass.

    Attributes:
        x, residual: the data ``[N, C, ...]``.
        grad: gradient of the output.
        weight, bias: the affine parameters ``[C]``, or None.
        running: running mean and variance ``[C]``.
        mask: bool ``[C]``, or None.
        counts: statistics that the backward pass updates, or None.
        options: fields of :class:`NormOptions`.
    """

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
        """The data and the parameters, as the ops take them."""
        return NormInputs(self.x, self.residual, self.weight, self.bias, self.mask)

    def on(self, device: torch.device) -> NormProblem:
        """The problem with its tensors on ``device``, in the same layouts."""
        counts = self.counts
        if counts is not None:
            counts = ChannelCounts.of([a.to(device) for a in counts.arrays], counts.tau, counts.decay)
        residual, weight, bias, mask = (
            None if tensor is None else _moved(tensor, device) for tensor in self.inputs[1:]
        )
        return NormProblem(
            x=_moved(self.x, device),
            grad=_moved(self.grad, device),
            residual=residual,
            weight=weight,
            bias=bias,
            running=(self.running[0].to(device, copy=True), self.running[1].to(device, copy=True)),
            mask=mask,
            counts=counts,
            options=self.options,
        )

    def forward(self, backend: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The output, the mean and the variance of a backend."""
        found: tuple[Tensor, Tensor, Tensor] = backend.norm_act_forward(
            self.inputs, Running(*self.running), NormOptions(**self.options)
        )
        return found

    def backward(self, backend: Any, mean: Tensor, var: Tensor) -> list[Tensor | None]:
        """The four gradients of a backend, and then the arrays of the counts."""
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
    """Random data. Masked channels hold NaN and infinities, because no kernel may use their values.

    Args:
        shape: ``[N, C, ...]`` of the data.
        dtype: dtype of the data.
        memory: a name of :data:`FORMATS`.
        activation: name of the activation.
        residual: whether a residual is added before the activation.
        masked: share of masked channels.
        training: whether the mean and variance are those of the data.
        affine: whether there are weight and bias.
        seed: seed of the random numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def data(offset: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * 2 + offset
        return values.to(dtype).contiguous(memory_format=FORMATS[memory])

    def drawn() -> Tensor:
        return torch.rand(shape[1], generator=generator, dtype=torch.float64, device="cpu")

    def vector(low: float, high: float) -> Tensor:
        return (drawn() * (high - low) + low).to(compute_dtype(x))

    x, grad = data(3.0), data()
    mask = None
    weight, bias = (vector(-2, 2), vector(-2, 4)) if affine else (None, None)
    if masked:
        mask = torch.rand(shape[1], generator=generator, dtype=torch.float32, device="cpu") < masked
        x[:, mask] = torch.nan
    updates = torch.tensor([3.0], dtype=torch.float32, device="cpu")
    return NormProblem(
        x=x,
        grad=grad,
        residual=data() if residual else None,
        weight=weight,
        bias=bias,
        running=(vector(-1, 1), vector(0.5, 2)),
        mask=mask,
        counts=ChannelCounts(vector(0, 2).float(), vector(0, 1).float(), updates, 1.5, 0.9),
        options={"activation": activation, "training": training, "eps": 1e-5},
    )


def laid_out(given: NormProblem, layout: str) -> NormProblem:
    """A copy in another memory layout: one of torch's, or one that is not aligned to 16 bytes."""
    residual = None if given.residual is None else _laid_out(given.residual, layout)
    return replace(given, x=_laid_out(given.x, layout), grad=_laid_out(given.grad, layout), residual=residual)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "permuted":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "not aligned":
        memory = values.new_empty(values.numel() + 1)
        return memory[1:].view(values.shape).copy_(values)
    return values.contiguous(memory_format=getattr(torch, layout))


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` with the strides of ``values``, and as far from an aligned address."""
    start = values.storage_offset()
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    memory = torch.empty(start + span, dtype=values.dtype, device=device)
    return memory.as_strided(values.shape, values.stride(), start).copy_(values)


def norm_difference(backend: Any, given: NormProblem, device: torch.device) -> str | None:
    """The first difference between a backend and the reference in both passes; None if they agree.

    The backward passes are given the reference's mean and variance.

    Args:
        backend: the examined backend.
        given: the problem, on the CPU.
        device: device of the tensors that the backend gets.
    """
    for name, got, want, near in _compared(backend, given, device):
        if _kind(got) != _kind(want):
            return f"{name}: got {_kind(got)}, expected {_kind(want)}"
        if got is None or want is None:
            continue
        if name in ("y", "grad_x") and got.stride() != given.x.stride():
            return f"{name}: got strides {got.stride()}, expected {given.x.stride()}"
        largest = want.double().abs().nan_to_num(0, 0, 0).max().item()
        if text := differing(name, got.cpu(), want, near * max(largest, 1e-30)):
            return text
    return None


def _compared(
    backend: Any, given: NormProblem, device: torch.device
) -> Iterator[tuple[str, Tensor | None, Tensor | None, float]]:
    """Results of a backend and of the reference by name, with the relative tolerance of each."""
    near, exact = ROUNDINGS[given.x.dtype], min(ROUNDINGS[given.x.dtype], 2e-6)
    there = given.on(device)
    want = given.forward(reference_norm)
    for name, mine, theirs in zip(("y", "mean", "var"), there.forward(backend), want, strict=True):
        yield name, mine, theirs, near if name == "y" else exact
    for i, name in enumerate(("running_mean", "running_var")):
        yield name, there.running[i], given.running[i], exact
    mean, var = want[1:]
    mine_grads = there.backward(backend, mean.to(device), var.to(device))
    names = ("grad_x", "grad_residual", "grad_weight", "grad_bias", "threshold", "activity", "updates")
    grads = zip(mine_grads, given.backward(reference_norm, mean, var), strict=True)
    for name, (got, expected) in zip(names, grads, strict=False):
        yield name, got, expected, near if name.startswith("grad_") else 2e-6


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
