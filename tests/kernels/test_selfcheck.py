"""The self-check at the first use: a backend that differs is refused once, and the result is remembered."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsekern.kernels import backends
from sparsekern.kernels.backends import reference
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.options import ADAM, MASK, SGD, STATISTICS
from sparsekern.kernels.selfcheck import cases, first_use, run, stored
from sparsekern.kernels.selfcheck.stored import Outcome, Store

CPU = torch.device("cpu")
HONEST = reference
Backend = Any


def lying(step: Callable[..., None] | None = None, **functions: Any) -> Backend:
    """The reference, with ``step`` called after each of its steps, or with other functions."""

    def step_(op: int, lists: Any, options: Any, rows: Any, *scalars: Any) -> None:
        reference.step_(op, lists, options, rows, *scalars)
        if step is not None:
            step(op, lists, options, rows)

    own = {
        name: getattr(reference, name)
        for name in ("channel_moments_", "norm_act_forward", "norm_act_backward")
    }
    return SimpleNamespace(**own | {"step_": step_, "CHECKS_MEMORY": False} | functions)


def last_bit(tensor: torch.Tensor) -> None:
    """Change one element of a tensor by one unit in the last place."""
    if tensor.numel():
        with torch.no_grad():
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
            changed = torch.nextafter(flat[0], torch.full_like(flat[0], float("inf")))
            tensor[(0,) * tensor.dim()] = changed


class Machine:
    """A machine whose CPU stands for a GPU; counts the checks that are run."""

    def __init__(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        self.modules: dict[str, Backend] = {"cuda": HONEST, "triton": HONEST, "reference": reference}
        self.checks: list[str] = []
        self.patch = patch
        patch.setenv("SPARSEKERN_CACHE", str(cache))
        for name in ("SPARSEKERN_BACKEND", "SPARSEKERN_SELFCHECK"):
            patch.delenv(name, raising=False)
        patch.setattr(backends, "_DEVICES", {"cpu": ("cuda", "triton", "reference")})
        patch.setattr(backends, "_CHECKED", {"cpu": ("cuda", "triton")})
        patch.setattr(backends, "module", self.modules.__getitem__)
        patch.setattr(backends, "why_not", lambda name, device: None)
        check = first_use.check
        patch.setattr(
            first_use, "check", lambda name, *given: self.checks.append(name) or check(name, *given)
        )
        self.restart()

    def restart(self) -> None:
        """As a new process, with the same cache directory."""
        backends.reset()
        first_use._unchecked.clear()
        self.checks.clear()

    def few_cases(self) -> None:
        """Check the first cases alone, where the test is not about the problems."""
        few = list(itertools.islice(cases.first_use(), 4))
        self.patch.setattr(cases, "first_use", lambda: few)
        self.patch.setattr(first_use, "_CASES", {})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    with monkeypatch.context() as patch:
        yield Machine(patch, tmp_path)
    backends.reset()


def refused(machine: Machine, name: str = "cuda") -> str:
    """The warning with which one call of ``choose`` refuses the backend ``name`` and takes the next."""
    with pytest.warns(UserWarning) as caught:
        chosen = backends.choose(CPU)
        assert backends.choose(CPU) is chosen
    assert chosen is machine.modules["triton"]
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(f"sparsekern runs without its {name} backend: its self-check on cpu failed: ")
    assert f"sparsekern selftest --backend {name} --device cpu" in text
    return text


# Each lies in one op and one dtype, in one element of one tensor, by one unit in the last place or one count.
LIES: dict[str, tuple[Callable[[], Backend], tuple[str, ...]]] = {
    "adam": (
        lambda: lying(lambda op, lists, *_: last_bit(lists[0][0]) if op == ADAM else None),
        ("adamw amsgrad", "torch.float32", "contiguous", "params[0] [17]: 1 of 17", "differ by up to"),
    ),
    "sgd in float16": (
        lambda: lying(
            lambda op, lists, *_: last_bit(lists[0][0])
            if op == SGD and lists[0][0].dtype is torch.float16
            else None
        ),
        ("sgd momentum", "torch.float16", "params[0]"),
    ),
    "nesterov in bfloat16": (
        lambda: lying(
            lambda op, lists, options, *_: last_bit(lists[2][1])
            if op == SGD and options.nesterov and lists[0][0].dtype is torch.bfloat16
            else None
        ),
        ("sgd nesterov", "torch.bfloat16", "momentum_buffers[1]"),
    ),
    "weights in channels_last": (
        lambda: lying(
            lambda op, lists, *_: last_bit(lists[0][4])
            if op == MASK and lists[0][4].is_contiguous(memory_format=torch.channels_last)
            and not lists[0][4].is_contiguous() else None
        ),
        ("mask", "params[4]"),
    ),
    "a count": (
        lambda: lying(
            lambda op, lists, options, rows: rows.table.sums[-1].add_(1) if op == STATISTICS else None
        ),
        ("statistics", "torch.float32", "sums[:, 0]"),
    ),
    "outside": (
        lambda: lying(
            lambda op, lists, *_: lists[1][0].as_strided((1,), (1,), lists[1][0].storage_offset() - 1).zero_()
            if op == ADAM else None
        ),
        ("adamw", "grads[0]", "outside of the tensor were written"),
    ),
    "channel moments": (
        lambda: lying(channel_moments_=lambda arrays: None),
        ("channel moments", "channels"),
    ),
    "norm forward": (
        lambda: lying(
            norm_act_forward=lambda inputs, *given: (
                lambda y, mean, var: (y * 1.01 if inputs.x.dtype is torch.float64 else y, mean, var)
            )(*reference.norm_act_forward(inputs, *given))
        ),
        ("norm with", "torch.float64", "y: "),
    ),
    "norm backward": (
        lambda: lying(
            norm_act_backward=lambda *given: (
                lambda x, residual, weight, bias: (x, residual, weight * 1.01, bias)
            )(*reference.norm_act_backward(*given))
        ),
        ("norm with", "grad_weight: "),
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_backend_that_lies_is_refused_in_one_call(lie: str, machine: Machine) -> None:
    make, parts = LIES[lie]
    machine.modules["cuda"] = make()
    machine.patch.setattr(first_use, "_CASES", {"triton": lambda: []})
    text = refused(machine)
    for part in parts:
        assert part in text
    assert machine.checks == ["cuda", "triton"]


def test_a_backend_that_raises_is_refused_and_the_reference_is_left(machine: Machine) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the CUDA kernels could not be launched: no kernel image (CUDA error 209)")

    machine.modules |= {"cuda": lying(step_=fail), "triton": lying(step_=fail)}
    with pytest.warns(UserWarning) as caught:
        assert backends.choose(CPU) is reference
        assert backends.choose(CPU) is reference
    assert ["triton" in str(warning.message).partition(":")[0] for warning in caught] == [False, True]
    assert all("RuntimeError: the CUDA kernels could not be launched" in str(w.message) for w in caught)


def test_a_forced_backend_is_checked_and_raises(machine: Machine) -> None:
    machine.few_cases()
    machine.modules["cuda"] = lying(lambda op, lists, *_: last_bit(lists[0][0]))
    machine.patch.setenv("SPARSEKERN_BACKEND", "cuda")
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="SPARSEKERN_BACKEND: got 'cuda' for tensors on cpu, expected a"
        ):
            backends.choose(CPU)
    assert machine.checks == ["cuda"]
    machine.patch.setenv("SPARSEKERN_SELFCHECK", "0")
    assert backends.choose(CPU) is machine.modules["cuda"]


def test_turned_off(machine: Machine) -> None:
    machine.modules["cuda"] = lying(lambda op, lists, *_: last_bit(lists[0][0]))
    machine.patch.setenv("SPARSEKERN_SELFCHECK", "0")
    assert backends.choose(CPU) is machine.modules["cuda"]
    assert machine.checks == []
    assert "off" in first_use.describe("cuda", CPU)
    backends.reset()
    machine.patch.setenv("SPARSEKERN_SELFCHECK", "no")
    with pytest.raises(ValueError, match="SPARSEKERN_SELFCHECK: got 'no', expected 0"):
        backends.choose(CPU)


def test_the_next_process_uses_the_stored_result(machine: Machine) -> None:
    machine.few_cases()
    assert "not run yet" in first_use.describe("cuda", CPU)
    assert backends.choose(CPU) is HONEST
    assert machine.checks == ["cuda"] and first_use.describe("cuda", CPU) == "passed"
    machine.restart()
    assert backends.choose(CPU) is HONEST
    assert machine.checks == []


def test_a_stored_failure_is_told_again_without_a_check(machine: Machine) -> None:
    machine.few_cases()
    machine.modules["cuda"] = lying(lambda op, lists, *_: last_bit(lists[0][0]))
    text = refused(machine)
    machine.restart()
    assert refused(machine) == text
    assert machine.checks == []
    assert "failed, not used: sgd momentum" in first_use.describe("cuda", CPU)


def test_another_library_driver_or_torch_is_checked_anew(machine: Machine, tmp_path: Path) -> None:
    machine.few_cases()
    library = tmp_path / "library.so"
    library.write_bytes(b"one")
    machine.patch.setattr(cuda_library, "path", lambda: library)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: library.write_bytes(b"two"),
        lambda: machine.patch.setattr(stored, "_driver", lambda: "580.1"),
        lambda: machine.patch.setattr(torch, "__version__", "9.9"),
        lambda: machine.patch.setattr(stored, "device_name", lambda device: "another GPU"),
    ]
    for change in changes:
        change()
        stored._digest.cache_clear()
        machine.restart()
        backends.choose(CPU)
        assert machine.checks == ["cuda"]
    machine.restart()
    backends.choose(CPU)
    assert machine.checks == []
    stored._digest.cache_clear()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "no JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "a list": lambda path: path.write_text("[]"),
    "cut": lambda path: path.write_text(path.read_text()[:40]),
    "another format": lambda path: path.write_text(path.read_text().replace(stored.FORMAT, "other")),
    "another version": lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 2')),
    "other settings": lambda path: path.write_text(path.read_text().replace(torch.__version__, "0.0")),
    "failure is a number": lambda path: path.write_text(path.read_text().replace("null", "3")),
    "no failure": lambda path: path.write_text(path.read_text().replace('"failure"', '"success"')),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_costs_a_warning_and_a_check(damage: str, machine: Machine) -> None:
    machine.few_cases()
    backends.choose(CPU)
    path = Store("cuda", CPU).path
    DAMAGES[damage](path)
    machine.restart()
    with pytest.warns(UserWarning, match="not a file of a self-check") as caught:
        assert backends.choose(CPU) is HONEST
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert machine.checks == ["cuda"]
    if damage != "a folder":
        machine.restart()
        assert Store("cuda", CPU).read() == Outcome(None)


def test_a_folder_that_cannot_be_written_costs_a_warning(machine: Machine, tmp_path: Path) -> None:
    machine.few_cases()
    (tmp_path / "file").write_text("")
    machine.patch.setenv("SPARSEKERN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="self") as caught:
        assert backends.choose(CPU) is HONEST
    assert len(caught) == 1


def test_during_a_capture_the_check_waits(machine: Machine) -> None:
    machine.few_cases()
    machine.modules["cuda"] = lying(lambda op, lists, *_: last_bit(lists[0][0]))
    machine.patch.setattr(first_use, "has_to_wait", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert backends.choose(CPU) is machine.modules["cuda"]
    assert machine.checks == []
    machine.patch.setattr(first_use, "has_to_wait", run.has_to_wait)
    assert "captured before the check use it: capture them again" in refused(machine)


def test_what_makes_a_check_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses import FakeTensorMode

    gpu = torch.device("cuda:0")
    assert not run.has_to_wait(CPU) and not run.has_to_wait(gpu)
    with FakeTensorMode():
        assert run.has_to_wait(CPU)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run.has_to_wait(gpu) and not run.has_to_wait(CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not run.has_to_wait(gpu)


def test_a_device_that_stopped_working_is_named_and_the_result_stored(machine: Machine) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    machine.modules["cuda"] = lying(step_=fail)
    machine.patch.setattr(first_use, "is_usable", lambda device: False)
    with pytest.raises(
        RuntimeError, match="^cpu: got a device that stopped working in the self-check of the cuda"
    ):
        backends.choose(CPU)
    machine.patch.setattr(first_use, "_CASES", {"triton": lambda: []})
    machine.restart()
    refused(machine)


def test_the_settings_of_the_caller_do_not_reach_the_check(machine: Machine) -> None:
    """Inference mode, autocast, a default device and dtype; and the caller's random numbers stay."""
    few = [case for case in cases.first_use() if case.dtype is torch.float32][:40:5]
    machine.patch.setattr(cases, "first_use", lambda: few)
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
            assert backends.choose(CPU) is HONEST
    finally:
        torch.set_default_dtype(default)
    assert machine.checks == ["cuda"]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_choice_costs_one_look_up(machine: Machine) -> None:
    machine.few_cases()
    backends.choose(CPU)
    machine.patch.setattr(backends, "_choose", lambda device: pytest.fail("chosen again"))
    assert backends.choose(CPU) is HONEST


def test_the_short_list_has_every_op_dtype_and_layout_and_takes_seconds() -> None:
    start, names = time.process_time(), []
    for result in run.results(reference, CPU, cases.first_use()):
        assert result.failure is None
        names.append(result.case)
    assert time.process_time() - start < 5
    ops = {(case.op, case.dtype) for case in names}
    assert {(op, dtype) for op in cases.OPS for dtype in cases.DTYPES} <= ops
    assert {*cases.LAYOUTS, *cases.norms.LAYOUTS} <= {case.layout for case in names}
    assert len({case.name for case in names}) == len(names)
    long = [case.name for case in cases.every()]
    assert len(long) == len(set(long)) > 700


def test_the_file_is_readable(machine: Machine) -> None:
    machine.few_cases()
    backends.choose(CPU)
    document = json.loads(Store("cuda", CPU).path.read_text())
    assert document["settings"]["backend"] == "cuda" and document["failure"] is None
