"""Counts of activations differ between processes: decisions use their mean, and each saves its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed.training import ARGUMENTS, STEPS, Run, batch, network
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.processes import run
from sparsekern import criteria
from sparsekern.fusion import fuse
from sparsekern.nn import NormAct2d

COUNT = criteria.GradientCount(level="activation")


def _start(how: str, **arguments: Any) -> Run:
    inner = network()
    assert fuse(inner, batch(0)[:1]).fused
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model: Any = inner
    if how == "parallel":
        model = DistributedDataParallel(inner)
    else:
        fully_shard(inner, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.01)
    options = ARGUMENTS | {"select": COUNT} | arguments
    return Run(
        model, inner, optimizer, sparsekern.Pruner(model, optimizer, batch(0)[:1], **options), rank, ranks
    )


def _state(own: Run) -> dict[str, Any]:
    modules = [m for m in own.inner.modules() if isinstance(m, NormAct2d)]
    state = own.pruner.state_dict()
    return {
        "channels": state["channels"],
        "masks": [m.mask.clone() for m in modules],
        "activations": state["activations"],
        "compact": [param.detach() for param in own.pruner.compact().parameters()],
        "kept": own.pruner.metrics()["kept"],
    }


def _pruned(how: str) -> dict[str, Any]:
    own = _start(how)
    own.train(range(STEPS))
    return _state(own)


def test_processes_decide_alike() -> None:
    for how in ("parallel", "sharded"):
        one, other = run(_pruned, 2, how)
        assert torch.equal(one["channels"], other["channels"])
        assert 0 < one["kept"] < 0.8 * len(one["channels"])
        for name in ("masks", "compact"):
            assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name
        assert any(mask.any() for mask in one["masks"])


def _averaged() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    own = _start("parallel", warmup=0.7, finish=0.95)
    own.train(range(4))
    activations = own.pruner._network.activations
    if own.rank:
        activations.updates.sub_(1)
    before = activations.state_dict()
    activations.average(own.pruner._events._ranks)
    return before, activations.state_dict()


def test_the_mean_of_what_each_has_counted() -> None:
    (one, after), (other, same) = run(_averaged, 2)
    assert not torch.equal(one["activity"], other["activity"])
    for name in ("activity", "updates"):
        mean = (one[name].double() + other[name].double()) / 2
        assert torch.equal(after[name], mean.float()) and torch.equal(after[name], same[name])
    # Each process keeps its own threshold.
    assert torch.equal(after["threshold"], one["threshold"])
    assert torch.equal(same["threshold"], other["threshold"])


def _saved(folder: str, stops: list[int]) -> dict[str, Any]:
    own = _start("parallel", shrink=True, round_to=1)
    done = 0
    for stop in stops:
        own.train(range(done, stop))
        own.pruner.save_checkpoint(Path(folder) / f"{stop}.pt")
        done = stop
    own.train(range(done, STEPS))
    return _state(own)


def _resumed(folder: str, stops: list[int]) -> list[dict[str, Any]]:
    ends = []
    for stop in stops:
        own = _start("parallel", shrink=True, round_to=1)
        own.pruner.load_checkpoint(Path(folder) / f"{stop}.pt")
        own.train(range(stop, STEPS))
        ends.append(_state(own))
    return ends


def test_two_processes_go_on_bit_by_bit(tmp_path: Path) -> None:
    stops = [3, 6]
    expected = run(_saved, 2, str(tmp_path), stops)
    assert any(
        not torch.equal(expected[0]["activations"][name], expected[1]["activations"][name])
        for name in ("threshold", "activity")
    )
    for rank, ends in enumerate(run(_resumed, 2, str(tmp_path), stops)):
        for end in ends:
            assert end["kept"] == expected[rank]["kept"]
            for name in ("threshold", "activity", "updates"):
                assert torch.equal(end["activations"][name], expected[rank]["activations"][name]), name
            for one, other in zip(end["compact"], expected[rank]["compact"], strict=True):
                np.testing.assert_array_equal(one, other)
