"""The cases of the self-check: short lists for the first use of a backend, a long list for ``selftest``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsekern.kernels.activations import ACTIVATIONS
from sparsekern.kernels.backends import reference
from sparsekern.kernels.rows import ChannelArrays
from sparsekern.kernels.selfcheck import norms
from sparsekern.kernels.selfcheck.calls import OPS
from sparsekern.kernels.selfcheck.comparison import moments_difference, step_difference
from sparsekern.kernels.selfcheck.problems import (
    DTYPES,
    GUARD,
    LARGE,
    LAYOUTS,
    ROW_LENGTHS,
    ROW_STATES,
    SHAPES,
    Problem,
    channel_arrays,
    problem,
)

Examine = Callable[[Any, torch.device], str | None]
"""Runs a backend on a device. Returns the first difference from the reference, None without one."""

MIXED = "some masked, some fading"
NOT_ALIGNED = "not aligned"

# One op of each kernel, in the setting that takes most lists.
_KERNELS = ("sgd momentum", "adamw amsgrad", "statistics", "mask")

# Shapes of the short list: each loop over a tensor once.
_SHORT = (
    ((17,), 0),
    ((3, 1, 3, 3), 0),
    ((7, 5), None),
    ((3, 33), 0),
    ((5, 8, 2, 2), 0),
    ((2, 32, 3, 3), 0),
    ((5, 3, 2, 2), 1),
    ((2, 7, 33), 1),
    ((2, 3, 4), 2),
    ((), None),
)

# Long rows and many outer indices, which several blocks share.
_SHARED = (((3, 20011), 0), ((2, 33000), 0), ((200, 40, 2, 2), 1), ((30001,), None), ((2100,), 0))


@dataclass(frozen=True)
class Case:
    """One problem for a backend.

    Attributes:
        op: name of the op and of its setting.
        dtype: dtype of the data.
        layout: memory layout of the data.
        detail: what else distinguishes the problem; may be empty.
        examine: runs the backend and compares it with the reference.
    """

    op: str
    dtype: torch.dtype
    layout: str
    detail: str
    examine: Examine

    @property
    def name(self) -> str:
        """Op, dtype, layout and detail as one text."""
        return ", ".join(filter(None, (self.op, str(self.dtype), self.layout, self.detail)))


def first_use() -> Iterator[Case]:
    """The short list: every op, dtype and layout once. The cheapest and most different cases come first."""
    for dtype, op in itertools.product(DTYPES, _KERNELS):
        yield step(op, dtype, "contiguous", shapes=_SHORT)
    yield from moments((7, 300))
    for activation, dtype in zip(itertools.cycle(ACTIVATIONS), DTYPES * 2, strict=False):
        for layout in norms.LAYOUTS:
            yield norm((3, 9, 5, 3), dtype, layout, activation, residual=True, masked=0.4)
    for layout, training in itertools.product(norms.LAYOUTS[:2], (True, False)):
        yield norm((9, 40, 17, 9), torch.float32, layout, "relu", training=training)
        yield norm((2, 3, 61, 67), torch.bfloat16, layout, "hardswish", training=training)
    for dtype, op in itertools.product(DTYPES, OPS):
        if op not in _KERNELS:
            yield step(op, dtype, "contiguous", shapes=_SHORT)
    for layout, op in itertools.product((*list(LAYOUTS)[1:], NOT_ALIGNED), _KERNELS):
        yield step(op, torch.float32, layout, shapes=_SHORT)
    for dtype, op in itertools.product(DTYPES[1:], _KERNELS):
        yield step(op, dtype, NOT_ALIGNED, shapes=_SHORT)
    for state, op in itertools.product(ROW_STATES, ("adamw", "sgd nesterov", "mask")):
        if state != MIXED:
            yield step(op, torch.float32, "channels_last", state, shapes=_SHORT)
    for op in _KERNELS:
        yield step(op, torch.float32, "contiguous", shapes=_SHARED, detail="large")


def first_use_of_triton() -> Iterator[Case]:
    """The short list for Triton, which compiles each kernel for each setting and dtype for some seconds."""
    for dtype, op in itertools.product(DTYPES, _KERNELS):
        yield step(op, dtype, "contiguous", shapes=_SHORT)
    yield from moments((7, 300))
    layouts = ("channels_last", "permuted", "all with holes", NOT_ALIGNED)
    for layout, op in itertools.product(layouts, _KERNELS):
        yield step(op, torch.float32, layout, shapes=_SHORT)
    for op in _KERNELS:
        yield step(op, torch.float32, "contiguous", shapes=_SHARED, detail="large")
    for layout, dtype in itertools.product(norms.LAYOUTS[:2], DTYPES):
        yield norm((3, 9, 5, 3), dtype, layout, "relu", residual=True, masked=0.4)


def every() -> Iterator[Case]:
    """The long list: every op in every dtype, layout and state of rows, and all shapes."""
    for op, dtype in itertools.product(OPS, DTYPES):
        yield step(op, dtype, "contiguous", seed=1, steps=3)
    for op, dtype, layout in itertools.product(_KERNELS, DTYPES, (*list(LAYOUTS)[1:], NOT_ALIGNED)):
        yield step(op, dtype, layout, seed=2, steps=2)
    for op, layout in itertools.product(("sgd scaled", "adamw scaled"), list(LAYOUTS)[1:]):
        yield step(op, torch.float32, layout, seed=2, steps=2)
    for op, dtype, state in itertools.product(
        ("sgd nesterov", "adam decay maximize", "statistics", "mask"), DTYPES, ROW_STATES
    ):
        if state != MIXED or op not in _KERNELS:
            yield step(op, dtype, "channels_last", state, seed=3, steps=4)
    for op, dtype, state in itertools.product(("sgd momentum", "adamw"), DTYPES, ("all live", MIXED)):
        yield step(op, dtype, "contiguous", state, seed=7, steps=2, shapes=ROW_LENGTHS, detail="row lengths")
    for op, spoiler in itertools.product(_KERNELS[:3], ("nan", "inf", "1e30")):
        yield step(op, torch.float32, "contiguous", seed=4, steps=2, spoiler=spoiler)
    for op, dtype in itertools.product(_KERNELS, DTYPES):
        yield step(op, dtype, "contiguous", seed=7, shapes=LARGE, detail="large")
    for op in _KERNELS[:3]:
        yield step(op, torch.float32, "contiguous", seed=6, steps=2, tracked=False)
    yield from moments((0, 1, 7, 700, 5000))
    yield from _every_norm()


def _every_norm() -> Iterator[Case]:
    for activation, dtype, layout in itertools.product(ACTIVATIONS, DTYPES, norms.LAYOUTS):
        for residual, masked in itertools.product((True, False), (0.0, 0.4)):
            options = {"residual": residual, "masked": masked, "training": residual}
            yield norm((3, 9, 5, 3), dtype, layout, activation, **options)
    for shape, dtype, layout in itertools.product(norms.LARGE, DTYPES, norms.LAYOUTS[:2]):
        yield norm(shape, dtype, layout, "relu", masked=0.3, seed=1)
    for shape, training in itertools.product(((6, 8), (3, 4, 9), (2, 4, 3, 2, 5)), (True, False)):
        options = {"residual": True, "training": training, "affine": False}
        yield norm(shape, torch.float32, "contiguous_format", "silu", **options)


def step(
    op: str,
    dtype: torch.dtype,
    layout: str,
    state: str = MIXED,
    *,
    detail: str = "",
    seed: int = 0,
    steps: int = 1,
    shapes: Any = SHAPES,
    spoiler: str = "",
    tracked: bool = True,
) -> Case:
    """A case of an op on lists.

    Args:
        op: a name of ``OPS``.
        dtype: dtype of the tensors.
        layout: a name of ``LAYOUTS``, or ``NOT_ALIGNED``.
        state: a name of ``ROW_STATES``.
        detail: what else the name of the case says.
        seed: seed of the random numbers.
        steps: number of compared steps; each begins with the state of the reference.
        shapes: shape and row dimension of each parameter.
        spoiler: a number in some elements of each gradient; none when empty.
        tracked: whether the parameters have rows.
    """
    guard = GUARD - 1 if layout == NOT_ALIGNED else GUARD
    lies = "contiguous" if layout == NOT_ALIGNED else layout

    def examine(backend: Any, device: torch.device) -> str | None:
        want = _made(dtype, lies, state, seed, shapes, guard).clone()
        for guarded in want.tensors["grads"] if spoiler else ():
            if guarded.view.numel() > 4:
                guarded.view.view(-1)[[1, -2]] = float(spoiler)
        if not tracked:
            want.starts = [-1] * len(want.starts)
        for _ in range(steps):
            if text := _one_step(backend, op, want, device):
                return text
        return None

    said = (state, detail, f"{spoiler} in gradients" if spoiler else "", "" if tracked else "without rows")
    return Case(op, dtype, layout, ", ".join(filter(None, said)), examine)


@functools.lru_cache(maxsize=4)
def _made(dtype: torch.dtype, layout: str, state: str, seed: int, shapes: Any, guard: int) -> Problem:
    """See ``problem``. Making a problem takes longer than a step, and neighbouring cases share one."""
    return problem(dtype, layout, state, seed=seed, shapes=shapes, guard=guard)


def _one_step(backend: Any, op: str, want: Problem, device: torch.device) -> str | None:
    """One step of a backend and of the reference, which changes ``want``; the difference of the two."""
    before, got = want.clone(), want.on(device)
    OPS[op].call(reference, want)
    OPS[op].on(device).call(backend, got)
    return step_difference(got.on(torch.device("cpu")), want, before)


def moments(channels: tuple[int, ...]) -> Iterator[Case]:
    """Cases of ``channel_moments_``, for each number of channels, with and without statistics of a step."""
    for count, pending in itertools.product(channels, (0.0, 1.0)):
        examine = functools.partial(_examine_moments, count, pending)
        detail = f"{count} channels, {'after' if pending else 'without'} a step"
        yield Case("channel moments", torch.float32, "contiguous", detail, examine)


def _examine_moments(channels: int, pending: float, backend: Any, device: torch.device) -> str | None:
    want = channel_arrays(channels, pending)
    got = _arrays_on(want, device)
    # Twice, for what a call leaves to the next.
    for _ in range(2):
        reference.channel_moments_(want)
        backend.channel_moments_(got)
        if text := moments_difference(_arrays_on(got, torch.device("cpu")), want):
            return text
    return None


def _arrays_on(arrays: ChannelArrays, device: torch.device) -> ChannelArrays:
    return ChannelArrays._make([*(array.to(device, copy=True) for array in arrays[:-1]), arrays.decay])


def norm(shape: tuple[int, ...], dtype: torch.dtype, layout: str, activation: str, **options: Any) -> Case:
    """A case of both passes of a normalisation with its activation; ``options`` as of ``norms.problem``."""

    def examine(backend: Any, device: torch.device) -> str | None:
        given = norms.laid_out(norms.problem(shape, dtype, "contiguous", activation, **options), layout)
        if given.options["training"]:
            given.options |= {"momentum": 0.1}
        return norms.norm_difference(backend, given, device)

    said = [str(list(shape)), *(f"{name} {value:g}" for name, value in options.items() if name != "seed")]
    return Case(f"norm with {activation}", dtype, layout, ", ".join(said), examine)
