"""Distributed checkpoints, and parameters that are sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optim.cases import OptimizerFactory, assert_same, attached_table, network, snapshot, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor


@pytest.mark.parametrize("flat", [False, True])
def test_optimizer_state_goes_through_distributed_checkpoint(under: OptimizerFactory, flat: bool) -> None:
    model = network()
    ours = under(model.parameters())
    train(model, ours.step, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(model, ours, options=options))

    twin = copy.deepcopy(model)
    fresh = under(twin.parameters(), lr=7.0)
    set_optimizer_state_dict(twin, fresh, saved, options=options)
    assert_same(snapshot(fresh), snapshot(ours))
    assert fresh.param_groups[0]["lr"] == 0.05
    for each in (model, twin):
        train(each, (ours if each is model else fresh).step, 2, seed=1)
    assert_same(snapshot(fresh), snapshot(ours))


def test_asking_a_fresh_optimizer_for_its_state_changes_nothing(under: OptimizerFactory) -> None:
    """Distributed checkpoint makes a step with lr 0 and gradients of 0 to create the state."""
    model = network()
    ours = under(model.parameters(), weight_decay=0.1)
    table = attached_table(ours)
    if table is not None:
        table.penalty.fill_(0.5)
        table.countdown[::2] = 4
        table.refresh()
    params = [p.detach().clone() for p in model.parameters()]
    rows = [] if table is None else [v.clone() for v in _rows(table)]
    get_optimizer_state_dict(model, ours)
    assert_same([p.detach() for p in model.parameters()], params)
    assert_same([] if table is None else _rows(table), rows)


def _rows(table: object) -> list[torch.Tensor]:
    names = ("countdown", "threshold", "activity", "channel_dot", "channel_dot_sq", "updates")
    return [getattr(table, name) for name in names]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dist.DeviceMesh]:
    """A device mesh of this one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parameters_that_wrap_others_are_refused_by_name(
    under: OptimizerFactory, mesh: dist.DeviceMesh
) -> None:
    partial = Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Partial()]))
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is a DTensor placed as \(Partial"):
        under.case.ours([partial])
    ours = under.case.ours([Parameter(torch.ones(2))])
    pair = Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(RuntimeError, match="parameter 1 of group 1 is a TwoTensor"):
        ours.add_param_group({"params": [Parameter(torch.ones(2)), pair]})
    assert len(ours.param_groups) == 1


def test_what_is_not_placed_as_the_parameter_is_refused(
    under: OptimizerFactory, mesh: dist.DeviceMesh
) -> None:
    sharded = Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    ours = under.case.ours([sharded])
    sharded.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(1)])
    with pytest.raises(RuntimeError, match=r"is a DTensor \(Shard\(dim=1\),\), expected a DTensor"):
        ours.step()
    sharded.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    ours.step()
    names = [name for name, value in ours.state[sharded].items() if name != "step"]
    for name in names:
        placed = ours.state[sharded][name]
        ours.state[sharded][name] = torch.ones(4, 2)
        with pytest.raises(RuntimeError, match=f"{name}.*got a plain tensor, expected a DTensor"):
            ours.step()
        ours.state[sharded][name] = placed
    assert torch.isfinite(sharded.full_tensor()).all()
