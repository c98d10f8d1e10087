"""The instruction sets and any number of threads compute the same bits; the ways around native code."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.isa_digests import RESULTS

from sparsekern.kernels import native
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import cpu
from sparsekern.kernels.native import pointers
from sparsekern.kernels.rows import RowTable
from sparsekern.kernels.selfcheck.calls import OPS, SGD, run_op
from sparsekern.kernels.selfcheck.problems import problem

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))} | variables


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables))


@functools.cache
def isas() -> list[str]:
    """The instruction sets of this machine, read from the error that lists them."""
    error = run("from sparsekern.kernels import native; native.load()", SPARSEKERN_CPU_ISA="none").stderr
    return error.strip().rpartition(": ")[2].split(", ")


@functools.cache
def digests(isa: str, threads: int = 1, *names: str) -> dict[str, str]:
    """Digests by name of what an instruction set computes, of all names if none is given."""
    command = [sys.executable, "-m", "kernels.isa_digests", *names]
    choice = {"SPARSEKERN_CPU_ISA": isa, "SPARSEKERN_BACKEND": "cpu", "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment(**choice))
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout)
    assert found.pop("isa") == isa
    return found


@pytest.mark.parametrize("name", RESULTS)
def test_isas_agree_bit_for_bit(name: str) -> None:
    assert "baseline" in isas()
    found = {isa: digests(isa)[name] for isa in isas()}
    assert len(set(found.values())) == 1, found


def test_threads_of_normalisations_do_not_change_a_bit() -> None:
    best = isas()[0]
    assert digests(best, 2, "norms")["norms"] == digests(best)["norms"]


def test_two_loops_are_the_default_on_amd_before_zen_5() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()] if cpuinfo.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in lines}
    early = facts.get("vendor_id") == "AuthenticAMD" and int(facts["cpu family"]) < 26
    isa = run(
        "from sparsekern.kernels import native; native.load(); print(native.isa())", SPARSEKERN_CPU_ISA=""
    ).stdout
    assert isa.strip().endswith("-apart") == (early and isa.strip() != "baseline")


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
