"""Budgets of time in several processes, whose clocks differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed.training import ARGUMENTS, STEPS, batch, loss_of, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.processes import run
from sparsekern.graph import ChannelGraph
from sparsekern.latency import LatencyModel
from sparsekern.latency.axes import lay_axes
from sparsekern.latency.measure import _call, _calls, _table
from sparsekern.prune.state import network as pruned_network


def _own_clock(
    model: nn.Module, graph: ChannelGraph, inputs: Any, *, round_to: int, **options: Any
) -> LatencyModel:
    """A clock with 1 ns per number that an op reads, and a deviation that differs between processes."""
    axes, axes_of = lay_axes(graph, graph.operations, round_to, 16)
    alone = {number: [operation] for number, operation in enumerate(graph.operations)}
    calls = _calls(graph, axes, axes_of, alone, _call)
    random = np.random.default_rng(dist.get_rank())
    seconds = {call.key: 1e-9 * call.elements * random.uniform(0.5, 2.0) for call in calls.values()}
    return LatencyModel(graph, axes, axes_of, _table(len(graph.operations), calls, seconds), round_to)


def _trained() -> tuple[torch.Tensor, str, float]:
    pruned_network.measure = _own_clock
    model = DistributedDataParallel(network())
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    arguments = ARGUMENTS | {"keep": 0.5, "of": "latency", "round_to": 2, "shrink": True}
    pruner = sparsekern.Pruner(model, optimizer, batch(0), **arguments)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        loss_of(model, batch(step, rank=rank, ranks=ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    latency = pruner._network.latency
    assert latency is not None
    return torch.from_numpy(latency.values), pruner.plan().to_json(), pruner.metrics()["macs_share"]


def test_all_processes_use_the_timings_of_the_first() -> None:
    first, second = run(_trained, 2)
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]
    assert first[2] < 0.9
