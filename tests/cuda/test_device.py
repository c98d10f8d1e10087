"""The CUDA and the Triton kernels on a GPU; collected where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels.tolerance import assert_equal_step
from torch import Tensor, nn

import sparsekern
from sparsekern.kernels import backends
from sparsekern.kernels.backends import reference
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.rows import RowTable
from sparsekern.kernels.selfcheck.calls import OPS, run_op
from sparsekern.kernels.selfcheck.problems import DTYPES, LAYOUTS, Problem, problem

DEVICE = torch.device("cuda:0")


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Fails, and does not fall back, where the kernels do not work."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", request.param)
    backends.reset()
    assert backends.why_not(request.param, "cuda") is None, backends.why_not(request.param, "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield backends.choose(DEVICE)
    monkeypatch.undo()
    backends.reset()


def _compare(backend: ModuleType, name: str, want: Problem) -> None:
    op = OPS[name]
    got, before = want.on(DEVICE), want.clone()
    op.call(reference, want)
    op.on(DEVICE).call(backend, got)
    assert_equal_step(got.on(torch.device("cpu")), want, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_op(backend: ModuleType, name: str, dtype: torch.dtype) -> None:
    _compare(backend, name, problem(dtype, "contiguous", "some masked, some fading", seed=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw scaled", "statistics", "mask"])
def test_layout(backend: ModuleType, name: str, layout: str) -> None:
    _compare(backend, name, problem(torch.float32, layout, "some masked, some fading", seed=2))


class _Training:
    """A convolution, its normalisation and a transposed convolution, with a table of all their rows."""

    def __init__(self, make: Callable[..., Any], **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 65, 3, padding=1), nn.BatchNorm2d(65), nn.ReLU(), nn.ConvTranspose2d(65, 33, 2)
        ).to(DEVICE)
        self.optimizer = make(self.model.parameters(), **options)
        tracked = [(p, 1 if name == "3.weight" else 0) for name, p in self.model.named_parameters()]
        self.table = RowTable(tracked, [[0, 65], [1, 66]])
        self.optimizer.attach(self.table)
        self.x = torch.randn(2, 3, 16, 16, device=DEVICE)

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        arrays = [value for value in self.table.state_dict().values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *arrays]


def _launches() -> int:
    """The number of CUDA kernels launched so far."""
    library = cuda_library.load()
    return 0 if library is None else library.sparsekern_cuda_launches()


MAKERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (sparsekern.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (sparsekern.optim.AdamW, {"lr": 1e-2, "capturable": True}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_waits_for_nothing_and_allocates_nothing(backend: ModuleType, name: str) -> None:
    make, options = MAKERS[name]
    training = _Training(make, **options)
    for _ in range(3):
        training.step()
    torch.cuda.synchronize()
    launches = _launches()
    allocated = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] == allocated
    # The step, what follows it, and the means per channel.
    assert _launches() - launches == (3 if backend.__name__.endswith("cuda") else 0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_captured_step_is_the_same_and_sees_new_masks(name: str) -> None:
    make, options = MAKERS[name]
    eager, captured = _Training(make, **options), _Training(make, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    # Capturing launches nothing.
    for _ in range(3):
        eager.step()
    for turn in range(4):
        if turn == 2:
            for training in (eager, captured):
                training.table.countdown[3] = 0
                training.table.countdown[7] = 2
                training.table.penalty[:5] = 0.5
        eager.step()
        graph.replay()
    torch.cuda.synchronize()
    assert captured.table.countdown[7] == 0
    for mine, theirs in zip(captured.tensors(), eager.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_two_runs_are_equal_bit_for_bit(backend: ModuleType) -> None:
    results = []
    for _ in range(2):
        params = [
            nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1)).to(DEVICE))
            for s in ((70, 4000), (300, 128, 2, 2), (3, 50000))
        ]
        table = RowTable([(params[0], 0), (params[1], 1), (params[2], 0)], [])
        for seed in range(3):
            torch.manual_seed(seed)
            grads = [torch.randn_like(param) for param in params]
            run_op(backend, "row_statistics_", params, grads, rows=table.rows_of(params))
        results.append([table.sums.clone(), table.threshold.clone(), table.activity.clone()])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
