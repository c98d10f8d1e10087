"""The table of benchmark cases, shared by the command and the pytest suite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One comparison with torch.

    Attributes:
        op: a key of :data:`sparsekern.bench.comparisons.OPS`: an op of ``sparsekern.kernels.ops`` by name, a
            whole optimizer step (``*-step``), or a whole training iteration (``*-iteration``).
        tensors: a key of ``NETWORKS`` or ``SHAPES`` in :mod:`sparsekern.bench.networks`; for ``norm_act*`` a
            key of ``LAYERS`` in :mod:`sparsekern.bench.norm`.
        backend: name of a backend of :mod:`sparsekern.kernels.backends`.
        dtype: dtype of parameters, gradients and state.
        masked: share of the channels that are masked, in [0, 1]; None without a row table.
        quick: whether ``--quick`` selects the case.
    """

    op: str
    tensors: str
    backend: str = "cpu"
    dtype: torch.dtype = torch.float32
    masked: float | None = 0.0
    quick: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        share = "plain" if self.masked is None else f"{self.masked:.0%}"
        return f"{self.op}/{self.backend}/{dtype}/{self.tensors}/{share}"

    @property
    def device(self) -> str:
        """Device type of the tensors."""
        return DEVICES[self.backend]


DEVICES = {"cpu": "cpu", "reference": "cpu", "cuda": "cuda", "triton": "cuda"}
"""Device type of the tensors, by backend."""

LISTS = ("unet-2m", "unet-31m", "mobilenetv3-seg", "resnet50")
QUICK = ("unet-2m", "mobilenetv3-seg")
SHORT_LAYERS = ("8x16x128x128",)


def _ops(backend: str, *, quick: bool) -> list[Case]:
    """Single ops of the step, over prepared lists of tensors."""
    cases = []
    for tensors in LISTS:
        short = quick and tensors in QUICK
        for masked in (None, 0.0, 0.5, 0.8):
            adamw = Case("adam_step_", tensors, backend, masked=masked, quick=short and masked in (0.0, 0.8))
            cases.append(adamw)
        cases.append(Case("sgd_step_", tensors, backend, quick=short))
        cases.append(Case("adam_step_", tensors, backend, torch.bfloat16, quick=short))
        cases += [Case(op, tensors, backend, quick=short) for op in ("row_statistics_", "row_mask_")]
    cases.append(Case("adam_step_", "unet-2m", backend, torch.float16))
    cases.append(Case("sgd_step_", "unet-31m", backend, torch.bfloat16))
    cases.append(Case("channel_moments_", "mobilenetv3-seg", backend, quick=quick))
    cases.append(Case("channel_moments_", "resnet50", backend))
    cases.append(Case("adam_step_", "flat-17m", backend, masked=None, quick=quick))
    cases.append(Case("sgd_step_", "flat-17m", backend, masked=None))
    return cases


def _steps(backend: str, *, quick: bool) -> list[Case]:
    """Whole calls of ``optimizer.step()``, including the Python code."""
    cases = [
        Case(f"{name}-step", "tiny-174", backend, masked=masked, quick=quick and masked is not None)
        for name in ("sgd", "adam", "adamw")
        for masked in (None, 0.0)
    ]
    for tensors in LISTS:
        cases.append(Case("adamw-step", tensors, backend, quick=quick and tensors in QUICK))
        cases.append(Case("sgd-step", tensors, backend))
        cases.append(Case("hooks-step", tensors, backend))
    return cases


def _norms(backend: str, *, quick: bool) -> list[Case]:
    """Normalisations with their activation, forward and backward."""
    return [
        Case(op, layer + layout, backend, dtype, masked, quick and layout == "" and layer in SHORT_LAYERS)
        for op in ("norm_act", "norm_act_backward")
        for layer in ("8x64x128x128", "8x16x128x128")
        for layout in ("", "-channels-last")
        for dtype, masked in ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, 0.5))
        if layer in SHORT_LAYERS or (dtype, masked) == (torch.float32, 0.0)
    ]


def _on_gpu(backend: str) -> list[Case]:
    return [
        *_ops(backend, quick=False),
        *_norms(backend, quick=False),
        *_steps(backend, quick=False),
        *(Case("adamw-iteration", tensors, backend) for tensors in LISTS),
    ]


CASES: tuple[Case, ...] = (
    *_ops("cpu", quick=True),
    # The reference backend, which also runs where no compiled backend works.
    Case("adam_step_", "unet-2m", "reference"),
    Case("sgd_step_", "unet-2m", "reference"),
    *_steps("cpu", quick=True),
    *_norms("cpu", quick=True),
    *(Case("adamw-iteration", tensors, quick=tensors == "unet-2m") for tensors in LISTS),
    *(Case("fused-iteration", tensors, quick=tensors == "unet-2m") for tensors in QUICK),
    *(case for backend in ("cuda", "triton") for case in _on_gpu(backend)),
)


def select(pattern: str = "", *, quick: bool = False, cases: Sequence[Case] = CASES) -> list[Case]:
    """The cases whose names match the regular expression ``pattern``; with ``quick`` only the quick ones.

    Raises:
        ValueError: ``pattern`` is not a regular expression or matches no case; the error names ``--filter``.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--filter: got {pattern!r}, expected a regular expression ({error})") from None
    chosen = [case for case in cases if (case.quick or not quick) and found.search(str(case))]
    if not chosen:
        which = "a part of the name of a case" + (" of --quick" if quick else "")
        raise ValueError(f"--filter: got {pattern!r}, expected {which}, such as {cases[0]}")
    return chosen
