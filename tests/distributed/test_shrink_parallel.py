"""Shrinking inside DistributedDataParallel: one call, the same wrapper, fewer bytes, still averaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed.training import (
    ARGUMENTS,
    STEPS,
    assert_equal_results,
    batch,
    loss_of,
    network,
    start,
    trained_each,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.processes import run

SHRINK = {"shrink": True, "round_to": 1}


def test_processes_shrink_as_one() -> None:
    cases = [(optimizer, SHRINK) for optimizer in ("ours AdamW", "ours SGD", "torch RMSprop")]
    alone = trained_each("alone", cases)
    for ranks, first in ((2, 0), (4, 1)):
        for results in run(trained_each, ranks, "parallel", cases[first : first + 2]):
            for result, expected in zip(results, alone[first : first + 2], strict=True):
                assert_equal_results(result, expected)
    whole = sum(p.numel() for p in network().parameters())
    assert all(sum(p.numel() for p in each.params) < whole / 2 for each in alone)


def _counting(seen: list[int]) -> Callable[..., torch.futures.Future[torch.Tensor]]:
    """A stateless communication hook that averages and records the bytes of each bucket."""

    # Without an annotation, because it would be a string here, which torch refuses.
    def counting(state: Any, bucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[no-untyped-def]
        seen.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    del counting.__annotations__["state"], counting.__annotations__["return"]
    return counting


def _bytes(options: dict[str, Any], compiled: bool) -> list[list[int]]:
    """Bytes of gradients and bytes all-reduced, at every step."""
    inner = network()
    model = DistributedDataParallel(inner, **options)
    buckets: list[int] = []
    model.register_comm_hook(None, _counting(buckets))
    called: nn.Module = torch.compile(model, backend="eager") if compiled else model
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.01)
    # The Pruner does not get the wrapper and has to find it.
    sparsekern.Pruner(inner, optimizer, batch(0)[:1], **ARGUMENTS, **SHRINK)
    seen, before = [], [id(p) for p in inner.parameters()]
    for step in range(STEPS):
        buckets.clear()
        images = batch(step, rank=dist.get_rank(), ranks=dist.get_world_size())
        loss_of(called, images).backward()
        seen.append([sum(p.grad.nbytes for p in inner.parameters()), sum(buckets)])
        own = torch.cat([p.grad.flatten() for p in inner.parameters()])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        assert all(torch.equal(other, own) for other in every)
        optimizer.step()
        optimizer.zero_grad()
    assert before == [id(p) for p in inner.parameters()]
    return seen


def _bytes_of_each() -> list[list[list[int]]]:
    views = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
    cases = (({}, False), ({"static_graph": True}, False), (views, False), ({}, True))
    return [_bytes(options, compiled) for options, compiled in cases]


def test_fewer_bytes_go_round_and_gradients_stay_averaged() -> None:
    first, second = run(_bytes_of_each, 2)
    assert first == second
    for steps in first:
        gradients, reduced = zip(*steps, strict=True)
        assert gradients == reduced
        assert reduced[-1] < reduced[0] / 2
        assert sorted(reduced, reverse=True) == list(reduced)


def _by_hand() -> list[Any]:
    """``shrink()`` when the user says so, with an averaged copy that goes along, and a resume afterwards."""
    training = start("parallel")
    training.train(range(STEPS))
    average = torch.optim.swa_utils.AveragedModel(training.inner)
    expected = training.inner(batch(0)).detach()
    assert training.pruner.shrink(also=[average])
    assert not training.pruner.shrink()
    difference = float((training.model(batch(0)) - expected).abs().max())
    assert float((average(batch(0)) - expected).abs().max()) < 1e-12
    saved = copy.deepcopy(
        {
            "model": training.inner.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "pruner": training.pruner.state_dict(),
        }
    )
    fresh = start("parallel")
    fresh.pruner.load_state_dict(saved["pruner"])
    fresh.inner.load_state_dict(saved["model"])
    fresh.optimizer.load_state_dict(saved["optimizer"])
    for each in (training, fresh):
        each.train(range(STEPS, STEPS + 2))
    same = all(
        torch.equal(a, b) for a, b in zip(training.inner.parameters(), fresh.inner.parameters(), strict=True)
    )
    return [difference, same]


def test_by_hand_with_a_copy_and_a_resume_into_a_full_size_wrapper() -> None:
    for difference, same in run(_by_hand, 2):
        assert difference < 1e-12
        assert same


def _refused(what: str) -> list[str]:
    """The error, and everything that changed in spite of it."""
    inner = network()
    model = DistributedDataParallel(inner)
    if what == "state":
        model.register_comm_hook(PowerSGDState(None), powerSGD_hook)
    if what == "builtin":
        model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=0.01)
    messages = []
    try:
        sparsekern.Pruner(model, optimizer, batch(0)[:1], **ARGUMENTS, **SHRINK)
    except ValueError as error:
        messages.append(str(error))
    assert not optimizer.tables
    pruner = sparsekern.Pruner(model, optimizer, batch(0)[:1], **ARGUMENTS)
    for step in range(STEPS):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    shapes = [p.shape for p in inner.parameters()]
    try:
        pruner.shrink()
    except ValueError as error:
        messages.append(str(error))
    assert shapes == [p.shape for p in inner.parameters()]
    return messages


def _refused_each() -> list[list[str]]:
    return [_refused("state"), _refused("builtin")]


def test_a_hook_that_knows_of_sizes_is_refused_before_anything_changes() -> None:
    for state, builtin in run(_refused_each, 2):
        assert len(state) == len(builtin) == 2
        for message in state:
            assert (
                "communication hook powerSGD_hook has a PowerSGDState as state, which may depend" in message
            )
        for message in builtin:
            assert "with torch's built-in communication hook" in message


def _sharded() -> list[str]:
    messages = []
    try:
        start("sharded", **SHRINK)
    except ValueError as error:
        messages.append(str(error))
    training = start("sharded")
    training.train(range(STEPS))
    before = [p.shape for p in training.inner.parameters()]
    try:
        training.pruner.shrink()
    except ValueError as error:
        messages.append(str(error))
    assert before == [p.shape for p in training.inner.parameters()]
    for use in (training.pruner.save_checkpoint, training.pruner.load_checkpoint):
        try:
            use("nowhere.pt")
        except ValueError as error:
            messages.append(str(error))
    assert not Path("nowhere.pt").exists()
    training.train(range(2))
    return messages


def test_sharded_models_are_refused_with_the_reason() -> None:
    for messages in run(_sharded, 2):
        assert len(messages) == 4
        for message in messages[:2]:
            assert "got a DTensor" in message
            assert "fully_shard fixes the sizes of its parts" in message
        for message in messages[2:]:
            assert "got a DTensor" in message
            assert "save state_dict() of model, optimizer and Pruner with torch.dist" in message
