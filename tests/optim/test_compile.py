"""``torch.compile(optimizer.step)``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from optim.cases import (
    Case,
    OptimizerFactory,
    assert_same,
    attached_table,
    copies,
    parameters,
    set_grads,
    snapshot,
    table_of,
)
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)])
def test_a_compiled_step_is_the_same_step(under: OptimizerFactory, lr: float | torch.Tensor) -> None:
    params = [*parameters()[:4], *parameters(1, torch.float64)[:2]]
    others = copies(params)
    compiled, eager = (
        under([{"params": ps[:3]}, {"params": ps[3:], "weight_decay": 0.1}], lr=lr) for ps in (params, others)
    )
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, backend=counter)
    for seed in range(4):
        set_grads(params, seed, others)
        step()
        eager.step()
        assert_same(snapshot(compiled, attached_table(compiled)), snapshot(eager, attached_table(eager)))
    # The first step of SGD with momentum makes its state.
    assert 1 <= counter.frame_count <= 2


def test_a_compiled_step_notices_tables(case: Case) -> None:
    params, others = parameters()[:3], parameters()[:3]
    pair = OptimizerFactory(case, False)(params), OptimizerFactory(case, False)(others)
    step = torch.compile(pair[0].step, backend="aot_eager")
    for seed, chosen in enumerate([None, slice(0, 2), slice(1, 3), None, slice(2, None, -2)]):
        tables = []
        for optimizer, ps in zip(pair, (params, others), strict=True):
            optimizer.detach()
            table = table_of(ps[chosen] if chosen else [])
            table.countdown[::3] = 2
            table.refresh()
            if chosen:
                optimizer.attach(table)
            tables.append(table)
        for again in range(2):
            set_grads(params, 10 * seed + again, others)
            step()
            pair[1].step()
        for optimizer, table in zip(pair, tables, strict=True):
            assert bool(chosen) == bool(table.updates)
            assert attached_table(optimizer) is (table if chosen else None)
        assert_same(snapshot(pair[0], tables[0]), snapshot(pair[1], tables[1]))
