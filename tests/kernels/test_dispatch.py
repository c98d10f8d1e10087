"""The routes to an op (eager, dispatcher, traced), and what autograd records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter

from sparsekern.kernels import backends, native
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.rows import Rows, RowTable
from sparsekern.kernels.selfcheck.calls import ADAM, SGD, run_op


class _Step:
    """Three small tensors, two of them with rows, and the calls that a whole step consists of."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        shapes = ((4, 3, 2), (3, 4, 2), (5,))
        self.params = [Parameter(torch.randn(s, generator=generator)) for s in shapes]
        self.grads = [torch.randn(s, generator=generator) for s in shapes]
        self.m, self.v, self.top = ([torch.zeros(s) for s in shapes] for _ in range(3))
        self.steps = [torch.zeros(()) for _ in shapes]
        self.table = RowTable([(self.params[0], 0), (self.params[1], 1)], [[0, 4], [1, 5], [2]])
        self.table.countdown[[1, 6]] = torch.tensor([0, 3], dtype=torch.int32)
        self.table.zero_masked(lambda param: ())
        self.rows = self.table.rows_of(self.params)

    def tensors(self) -> list[Tensor]:
        arrays = [v for v in self.table.state_dict().values() if isinstance(v, Tensor)]
        return [*self.params, *self.grads, *self.m, *self.v, *self.top, *self.steps, *arrays]

    def call(self, name: str) -> None:
        lists = (self.params, self.grads)
        if name == "sgd":
            options = SGD | {"momentum": 0.9}
            run_op(_ops, "sgd_step_", *lists, self.m, **options, rows=self.rows)
        elif name == "sgd without rows":
            run_op(_ops, "sgd_step_", *lists, [], **SGD, rows=None)
        elif name == "adam tensor lr":
            options = ADAM | {"amsgrad": True, "lr": torch.tensor(0.01), "decoupled": True}
            states = (self.m, self.v, self.top, self.steps)
            run_op(_ops, "adam_step_", *lists, *states, **options, rows=self.rows)
        elif name == "adam scaled":
            options = ADAM | {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}
            run_op(_ops, "adam_step_", *lists, self.m, self.v, [], self.steps, **options, rows=self.rows)
        elif name == "around an external step":
            run_op(_ops, "row_statistics_", *lists, rows=self.rows)
            run_op(_ops, "row_mask_", self.params, lr=0.1, rows=self.rows)
        _ops.channel_moments_(self.table)


CALLS = ["sgd", "sgd without rows", "adam tensor lr", "adam scaled", "around an external step"]


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake and functionalisation of every op, with the arguments that the functions pass."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(_ops, "traced", lambda tensor: True)
    monkeypatch.setattr(
        torch._ops.OpOverload, "__call__", lambda op, *args, **kwargs: calls.append((op, args, kwargs))
    )
    step = _Step()
    step.call(name)
    monkeypatch.undo()
    assert len(calls) == (3 if "external" in name else 2)
    for op, args, kwargs in calls:
        torch.library.opcheck(op, args, kwargs)
        # The compiler's CUDA graphs leave it out.
        assert torch.Tag.cudagraph_unsafe in op.tags


@pytest.mark.parametrize(("name", "backend"), [*((name, "aot_eager") for name in CALLS), ("sgd", "inductor")])
def test_compiled_is_eager(name: str, backend: str) -> None:
    eager, compiled = _Step(), _Step()

    @torch.compile(fullgraph=True, backend=backend)
    @torch.no_grad()
    def step() -> None:
        compiled.call(name)

    torch._dynamo.reset()
    for _ in range(2):
        eager.call(name)
        step()
    for mine, theirs in zip(compiled.tensors(), eager.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_fake_tensors_take_the_dispatcher() -> None:
    """Nothing reads the memory of a tensor that has none."""
    with FakeTensorMode():
        step = object.__new__(_Step)
        step.params = [Parameter(torch.zeros(4, 3))]
        step.grads, step.m = [torch.zeros(4, 3)], [torch.zeros(4, 3)]
        table = object.__new__(RowTable)
        table._allocate(4, 2, torch.device("cpu"))
        table.tau, table.decay = 1.0, 0.9
        step.rows = Rows(table, [0], [0])
        table.gate_offsets, table.gate_rows = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
        step.table = table
        for name in ("sgd", "sgd without rows", "around an external step"):
            step.call(name)


def test_a_subclass_of_parameter_is_stepped() -> None:
    class Named(Parameter):
        pass

    param = Named(torch.ones(3))
    run_op(_ops, "sgd_step_", [param], [torch.ones(3)], [], **SGD, rows=None)
    assert torch.equal(param, torch.full((3,), 1 - 0.05))


WORKING = [name for name, works, _ in backends.available() if works]


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("name", ["sgd", "adam tensor lr", "around an external step"])
def test_autograd_sees_that_parameters_were_written(
    name: str, backend: str, force_backend: Callable[[str], None]
) -> None:
    force_backend(backend)
    step = _Step()
    loss = sum((param.square().sum() for param in step.params), torch.zeros(()))
    step.call(name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", WORKING)
@pytest.mark.parametrize("name", CALLS)
def test_one_native_call_for_each_list(name: str, backend: str, force_backend: Callable[[str], None]) -> None:
    force_backend(backend)
    step = _Step()
    step.call(name)
    before = native.native_call_count()
    step.call(name)
    lists = 2 if "external" in name else 1
    assert native.native_call_count() - before == (lists if backend == "cpu" else 0)
