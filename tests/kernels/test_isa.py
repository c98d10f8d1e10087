"""The instruction sets and any number of threads compute the same bits; the ways around native code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.kernels import native
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import cpu
from sparsekern.kernels.native import pointers
from sparsekern.kernels.rows import RowTable
from sparsekern.kernels.selfcheck.calls import OPS, SGD, run_op
from sparsekern.kernels.selfcheck.problems import problem

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

# Each instruction set runs in its own process, because it is chosen once, when the kernels are loaded.
DIGEST = """
import hashlib, sys, torch
from sparsekern.kernels.selfcheck import calls, problems
from sparsekern.kernels import native, ops as _ops
digest = hashlib.sha256()
for dtype in problems.DTYPES:
    contiguous = [("contiguous", shapes) for shapes in (problems.SHAPES, problems.ROW_LENGTHS)]
    for layout, shapes in *contiguous, ("channels_last", problems.SHAPES):
        # float16 differs from the others in its loads and stores alone.
        states = ["some masked, some fading"] if dtype is torch.float16 else problems.ROW_STATES
        for row_state in states:
            unused = problems.problem(dtype, layout, row_state, shapes=shapes)
            for op in calls.OPS.values():
                problem = unused.clone()
                op.call(_ops, problem)
                for entry in problem.entries().values():
                    digest.update(entry.buffer.view(torch.uint8).numpy().tobytes())
print(native.isa(), digest.hexdigest())
"""


# Weights, gradients and state take every value of a type of two bytes, each in another order: NaN of all
# kinds, infinities and subnormal numbers meet ordinary ones. Lengths of rows that end within a register, and
# columns. Which bits a NaN has is free in float16, which keeps those of an operand; bfloat16 has one NaN.
EVERY_VALUE = """
import hashlib, torch
from sparsekern.kernels.selfcheck.calls import run_op
from sparsekern.kernels import native, ops as _ops
from sparsekern.kernels.rows import Rows, RowTable
digest = hashlib.sha256()
dtype = torch.DTYPE
bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
shapes = ((64, 1024), 0), ((64, 1021), 0), ((4096, 16), 0), ((16, 256, 4, 4), 1), ((64, 113, 3, 3), 1)
for shape, dim in shapes:
    size = torch.Size(shape).numel()
    def some(seed):
        order = torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))
        return bits[order].repeat(2)[:size].view(shape).clone()
    for fading in False, True:
        w, d, m, v = map(some, range(4))
        table = RowTable([(w, dim)], [torch.arange(w.shape[dim]).numpy()])
        table.threshold.fill_(0.5)
        if fading:
            table.countdown[::3] = 4
        rows = Rows(table, [0], [dim])
        options = dict(lr=0.1, weight_decay=0.01, maximize=False, grad_scale=None, found_inf=None, rows=rows)
        betas = dict(beta1=0.9, beta2=0.99, eps=1e-8, decoupled=True, amsgrad=False)
        momentum = dict(momentum=0.9, dampening=0.0, nesterov=False, first=False)
        run_op(_ops, "adam_step_", [w], [d], [m], [v], [], [torch.tensor(3.0)], **betas, **options)
        run_op(_ops, "sgd_step_", [w], [d], [m], **momentum, **options)
        for tensor in (w, m, v, table.sums, table.activity):
            if dtype is torch.float16:
                tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(native.isa(), digest.hexdigest())
"""

# Rows whose sums are finite, with thresholds of all kinds: some loops compare bfloat16 as integers. The
# gradients are all numbers of a type of two bytes below 2 ** 15.
COUNTS = """
import hashlib, torch
from sparsekern.kernels.selfcheck.calls import SGD, run_op
from sparsekern.kernels import native, ops as _ops
from sparsekern.kernels.rows import Rows, RowTable
digest = hashlib.sha256()
every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
thresholds = torch.tensor([0.5, 1e-3, 0.0, -0.0, 1e-40, 0.501, torch.inf, torch.nan])
for dtype in torch.bfloat16, torch.float16, torch.float32:
    values = every.view(torch.float16 if dtype is torch.float16 else torch.bfloat16)
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
        digest.update(table.sums.numpy().tobytes())
print(native.isa(), digest.hexdigest())
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@functools.cache
def isas() -> list[str]:
    """The instruction sets of this machine, read from the error that lists them."""
    error = run("from sparsekern.kernels import native; native.load()", SPARSEKERN_CPU_ISA="none").stderr
    return error.strip().rpartition(": ")[2].split(", ")


EVERY = {dtype: EVERY_VALUE.replace("DTYPE", dtype) for dtype in ("bfloat16", "float16")}


@pytest.mark.parametrize("code", [DIGEST, COUNTS, *EVERY.values()], ids=["ops", "counts", *EVERY])
def test_isas_agree_bit_for_bit(code: str) -> None:
    digests = {}
    for isa in isas():
        result = run(code, SPARSEKERN_CPU_ISA=isa, SPARSEKERN_BACKEND="cpu")
        assert result.returncode == 0, result.stderr
        chosen, digest = result.stdout.split()
        assert chosen == isa
        digests[isa] = digest
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests


def test_unknown_isa_is_refused() -> None:
    result = run("from sparsekern.kernels import native; native.load()", SPARSEKERN_CPU_ISA="v9")
    assert result.returncode != 0
    assert "ValueError: SPARSEKERN_CPU_ISA: got 'v9', expected one that this machine runs" in result.stderr


def test_native_code_can_be_turned_off() -> None:
    code = "from sparsekern.kernels import native; print(native.load(), native.isa(), native.reason)"
    result = run(code, SPARSEKERN_NO_NATIVE="1")
    assert result.stdout.strip() == "None None SPARSEKERN_NO_NATIVE=1 is set"


# Rows in several pieces, gathered over outer indices, and of one element.
LARGE = [((70, 1200), 0), ((3, 70000), 0), ((600, 128, 2, 2), 1), ((200, 900), 1), ((40000,), 0)]


def stepped(threads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    params = [torch.nn.Parameter(noise(shape)) for shape, _ in LARGE]
    grads = [noise(shape) for shape, _ in LARGE]
    means = [torch.zeros(shape) for shape, _ in LARGE]
    squares = [torch.zeros(shape) for shape, _ in LARGE]
    steps = [torch.tensor(0.0) for _ in LARGE]
    table = RowTable(list(zip(params, (dim for _, dim in LARGE), strict=True)), [])
    table.countdown[::3] = 0
    table.zero_masked(lambda param: ())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            run_op(
                _ops,
                "adam_step_",
                params,
                grads,
                means,
                squares,
                [],
                steps,
                lr=1e-3,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.01,
                decoupled=True,
                amsgrad=False,
                maximize=False,
                rows=table.rows_of(params),
            )
    finally:
        torch.set_num_threads(before)
    return [*params, *means, *squares, table.sums, table.threshold, table.activity]


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    for one, many in zip(stepped(1), stepped(threads), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("op", ["adamw", "sgd momentum", "statistics", "mask"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "all with holes"])
def test_addresses_read_in_python(monkeypatch: pytest.MonkeyPatch, layout: str, op: str) -> None:
    direct = problem(torch.float32, layout, "some masked, some fading")
    around = direct.clone()
    call = OPS[op]
    call.call(cpu, direct)
    monkeypatch.setattr(native, "exchanges", False)
    call.call(cpu, around)
    for mine, other in zip(direct.entries().values(), around.entries().values(), strict=True):
        assert torch.equal(mine.buffer.nan_to_num(7), other.buffer.nan_to_num(7))


def test_addresses_are_refused_when_a_tensor_has_changed() -> None:
    tensor = torch.zeros(3, 4)
    layouts = [pointers.layout(tensor)]
    assert pointers.addresses_of_lists([[tensor]], layouts, torch.float32, 5, CPU) == [[tensor.data_ptr()]]
    for other in (tensor.t(), tensor.double(), torch.zeros(4, 3), torch.zeros(3, 4, device="meta")):
        assert pointers.addresses_of_lists([[other]], layouts, torch.float32, 5, CPU) is None


def test_storage_exchanged_behind_a_parameter() -> None:
    """The native plan is cached by the identity of tensors; addresses and strides are read at every call."""
    param = torch.nn.Parameter(torch.ones(4, 3, 2, 2))
    options = SGD | {"lr": 0.5}
    grad = torch.ones(4, 3, 2, 2)
    run_op(cpu, "sgd_step_", [param], [grad], [], **options, rows=None)
    old = param.data
    for new in (torch.ones(4, 3, 2, 2), torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last)):
        param.data = new
        run_op(cpu, "sgd_step_", [param], [grad], [], **options, rows=None)
        assert torch.equal(param, torch.full_like(param, 0.5))
        assert torch.equal(old, torch.full_like(old, 0.5))


def test_writes_are_told_to_autograd() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    run_op(cpu, "sgd_step_", [param], [torch.ones(3)], [], **SGD, rows=None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
