"""Digests of what the kernels of one instruction set compute; equal bits give equal digests.

A process loads the kernels of one instruction set, so each has a process of its own, which does all of this:
``python -m kernels.isa_digests [NAME ...]`` prints ``{"isa": ..., NAME: digest, ...}``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from sparsekern.kernels import native
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import cpu
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.rows import Rows, RowTable
from sparsekern.kernels.selfcheck import norms, problems
from sparsekern.kernels.selfcheck.calls import OPS, SGD, run_op

# Every pattern of the bits of a type of two bytes.
EVERY = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _after_ops() -> Iterable[Tensor]:
    """The memory that every op leaves, with what lies around the tensors."""
    for dtype in problems.DTYPES:
        contiguous = [("contiguous", shapes) for shapes in (problems.SHAPES, problems.ROW_LENGTHS)]
        for layout, shapes in *contiguous, ("channels_last", problems.SHAPES):
            # float16 differs from the others in its loads and stores alone.
            states = ["some masked, some fading"] if dtype is torch.float16 else problems.ROW_STATES
            for row_state in states:
                whole = problems.problem(dtype, layout, row_state, shapes=shapes)
                for op in OPS.values():
                    used = {name: whole.tensors[name] for name in op.lists if name}
                    problem = replace(whole, tensors=used).clone()
                    op.call(_ops, problem)
                    for entry in problem.entries().values():
                        yield entry.buffer


def _after_every_value(dtype: torch.dtype) -> Iterable[Tensor]:
    """Weights, gradients and state take every value of a type of two bytes, each in another order.

    NaN of all kinds, infinities and subnormal numbers meet ordinary ones, in lengths of rows that end within
    a register, and in columns. Which bits a NaN has is free in float16, which keeps those of an operand;
    bfloat16 has one NaN.
    """
    bits = EVERY.view(dtype)
    shapes = ((64, 1024), 0), ((64, 1021), 0), ((4096, 16), 0), ((16, 256, 4, 4), 1), ((64, 113, 3, 3), 1)
    for (shape, dim), fading in itertools.product(shapes, (False, True)):
        orders = [torch.randperm(2**16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        size = torch.Size(shape).numel()
        w, d, m, v = (bits[order].repeat(2)[:size].view(shape).clone() for order in orders)
        table = RowTable([(w, dim)], [torch.arange(w.shape[dim]).numpy()])
        table.threshold.fill_(0.5)
        if fading:
            table.countdown[::3] = 4
        options = SGD | {"lr": 0.1, "weight_decay": 0.01, "rows": Rows(table, [0], [dim])}
        adam = {name: options[name] for name in ("lr", "weight_decay", "maximize", "rows")}
        betas = dict(beta1=0.9, beta2=0.99, eps=1e-8, decoupled=True, amsgrad=False)
        run_op(_ops, "adam_step_", [w], [d], [m], [v], [], [torch.tensor(3.0)], **betas, **adam)
        run_op(_ops, "sgd_step_", [w], [d], [m], **options | {"momentum": 0.9})
        for tensor in (w, m, v, table.sums, table.activity):
            yield tensor.masked_fill(tensor.isnan(), torch.nan) if dtype is torch.float16 else tensor


def _counts() -> Iterable[Tensor]:
    """Sums of rows that are finite, with thresholds of all kinds: some loops compare bfloat16 as integers."""
    thresholds = torch.tensor([0.5, 1e-3, 0.0, -0.0, 1e-40, 0.501, torch.inf, torch.nan])
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        values = EVERY.view(torch.float16 if dtype is torch.float16 else torch.bfloat16)
        values = values[values.abs() < 2**15]
        values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))].to(dtype)
        for width in 16, 72, 250, 1024:
            d = values[: len(values) // width * width].view(-1, width).clone()
            w = d.roll(1, 0)
            table = RowTable([(w, 0)], [torch.arange(len(w)).numpy()])
            table.threshold.copy_(thresholds.repeat(len(w))[: len(w)])
            expected = (d.abs() > table.threshold[:, None]).sum(1)
            run_op(_ops, "sgd_step_", [w], [d], [], **SGD, rows=Rows(table, [0], [0]))
            assert torch.equal(table.sums.view(-1, 4)[:, 0], expected.float()), (dtype, width)
            yield table.sums


def _norms() -> Iterable[Tensor]:
    """Outputs and gradients of normalisations with activations; the last shape is done in several pieces."""
    dtypes, large = (torch.float32, torch.float64, torch.bfloat16), (4, 40, 60, 70)
    for dtype, memory, activation in itertools.product(dtypes, norms.FORMATS, ACTIVATIONS):
        for shape in [*norms.SHAPES, *[large] * (activation == "relu")]:
            given = norms.problem(shape, dtype, memory, activation, residual=shape[0] > 2, masked=0.3)
            y, mean, var = given.forward(cpu)
            found = (y, mean, var, *given.backward(cpu, mean, var))
            yield from (tensor for tensor in found if tensor is not None)


RESULTS: dict[str, Callable[[], Iterable[Tensor]]] = {
    "ops": _after_ops,
    "counts": _counts,
    "bfloat16": lambda: _after_every_value(torch.bfloat16),
    "float16": lambda: _after_every_value(torch.float16),
    "norms": _norms,
}


if __name__ == "__main__":
    digests = {name: _digest(RESULTS[name]()) for name in sys.argv[1:] or RESULTS}
    print(json.dumps({"isa": native.isa(), **digests}))
