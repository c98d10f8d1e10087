"""The optimizers on sharded parameters: every element equals that of one process; state is placed alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

import sparsekern
from benchmarks.processes import run

SHAPES = ((10, 3, 3), (5,), (1, 4), (3, 8), (16, 2))
"""Shapes whose parts in four processes are: uneven; last one empty; three empty; one empty; even."""

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True, "maximize": True}),
    ("AdamW", {"weight_decay": 0.1}),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _values(seed: int, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]


def _stepped(
    params: list[Parameter], place: Any, name: str, options: dict[str, Any], dtype: torch.dtype
) -> Any:
    optimizer = getattr(sparsekern.optim, name)(params, lr=0.1, **options)
    for step in range(3):
        for param, grad in zip(params, _values(step + 1, dtype), strict=True):
            param.grad = place(grad)
        optimizer.step()
    return optimizer


def _cases() -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (4,))
    results: list[list[Tensor]] = []
    for placement in (Shard(0), Shard(-1), Replicate()):

        def place(tensor: Tensor, placement: Any = placement) -> DTensor:
            dim = [Shard(placement.dim % tensor.dim())] if isinstance(placement, Shard) else [placement]
            return distribute_tensor(tensor, mesh, dim)

        for dtype in DTYPES:
            for name, options in CASES:
                params = [Parameter(place(value)) for value in _values(0, dtype)]
                optimizer = _stepped(params, place, name, options, dtype)
                tensors = list(params)
                for param in params:
                    for key, value in optimizer.state[param].items():
                        if key == "step":
                            assert float(value) == 3
                            assert not isinstance(value, DTensor)
                        else:
                            assert value.placements == param.placements
                            tensors.append(value)
                copied = getattr(sparsekern.optim, name)(params, lr=0.1, **options)
                copied.load_state_dict(optimizer.state_dict())
                for param, grad in zip(params, _values(9, dtype), strict=True):
                    param.grad = place(grad)
                copied.step()
                results.append([tensor.full_tensor().detach() for tensor in tensors])
    return results


def _whole(name: str, options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    params = [Parameter(value) for value in _values(0, dtype)]
    optimizer = _stepped(params, lambda grad: grad, name, options, dtype)
    for param, grad in zip(params, _values(9, dtype), strict=True):
        param.grad = grad
    optimizer.step()
    states = [optimizer.state[param] for param in params]
    kept = [value for state in states for key, value in state.items() if key != "step"]
    return [tensor.detach() for tensor in (*params, *kept)]


def test_every_element_is_as_in_one_process() -> None:
    expected = [_whole(name, options, dtype) for dtype in DTYPES for name, options in CASES]
    for rank in run(_cases, 4):
        for got, wanted in zip(rank, expected * 3, strict=True):
            # The kernels give the same bits for an element, wherever it lies in memory.
            torch.testing.assert_close(got[: len(SHAPES)], wanted[: len(SHAPES)], rtol=0, atol=0)


def _scaled() -> list[Any]:
    """A gradient that overflows in one process skips the step of all."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    for value in (1.0, float("inf"), 1.0):
        x = torch.full((2, 4), value if torch.distributed.get_rank() == 1 else 1.0)
        before = [p.full_tensor().detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(model(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [p.full_tensor().detach() for p in model.parameters()]
        seen.append(
            (scaler.get_scale(), any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        )
    return seen


def test_an_overflow_in_one_process_skips_the_step_of_all() -> None:
    assert run(_scaled, 2) == [[(4.0, True), (2.0, False), (2.0, True)]] * 2


def _compiled(name: str, options: dict[str, Any]) -> list[list[Tensor]]:
    """The results of a compiled and of an uncompiled step."""
    mesh = init_device_mesh("cpu", (1,))
    results = []
    for compiled in (True, False):
        param = Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        optimizer = getattr(sparsekern.optim, name)([param], lr=0.1, **options)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for factor in (1.0, 2.0, 3.0):
            param.grad = distribute_tensor(torch.arange(8.0).reshape(4, 2) * factor, mesh, [Shard(0)])
            step()
        assert list(optimizer.state) == [param]
        kept = [value for value in optimizer.state[param].values() if isinstance(value, DTensor)]
        assert kept
        results.append([tensor.full_tensor().detach() for tensor in (param, *kept)])
    return results


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_a_compiled_step_does_the_same(name: str, options: dict[str, Any]) -> None:
    ((compiled, eager),) = run(_compiled, 1, name, options)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
