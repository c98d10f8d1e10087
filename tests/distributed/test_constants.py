"""Masked columns in several processes: gradients are averaged or sharded, and constants move as in one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from constant_functions import StarReLU
from distributed.training import STEPS, Result, Run, assert_equal_results, batch, network
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.processes import run


def _trained(how: str) -> tuple[Result, bool]:
    inner = network()
    for block in (inner.stem, inner.down, inner.mid):
        block[2] = StarReLU().double()
    model: nn.Module = inner
    rank, ranks = (0, 1) if how == "alone" else (dist.get_rank(), dist.get_world_size())
    if how == "parallel":
        model = DistributedDataParallel(inner)
    elif how == "sharded":
        fully_shard(inner, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.01, weight_decay=0.1)
    arguments = {"keep": 0.3, "steps": STEPS, "events": 3, "warmup": 0.2, "finish": 0.8}
    pruner = sparsekern.Pruner(model, optimizer, batch(0)[:1], **arguments)
    trained = Run(model, inner, optimizer, pruner, rank, ranks)
    trained.train(range(STEPS))
    masked = any(group.masked_columns for group in pruner.graph.groups)
    return trained.result(), masked


def _both() -> list[tuple[Result, bool]]:
    return [_trained("parallel"), _trained("sharded")]


def test_two_processes_mask_columns_as_one() -> None:
    alone, masked = _trained("alone")
    assert masked
    for results in run(_both, 2):
        for result, _ in results:
            assert_equal_results(result, alone)
