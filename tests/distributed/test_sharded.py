"""Parameters sharded by ``fully_shard`` (FSDP2) get the masks of one process, wherever they are cut."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.training import (
    STEPS,
    Result,
    assert_equal_results,
    batch,
    network,
    start,
    trained,
    trained_each,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard

import sparsekern
from benchmarks.processes import run

CASES: list[tuple[str, dict[str, Any]]] = [("ours AdamW", {}), ("ours SGD", {}), ("torch AdamW", {})]


def test_two_processes_prune_as_one() -> None:
    alone = trained_each("alone", CASES)
    for results in run(trained_each, 2, "sharded", CASES):
        for result, expected in zip(results, alone, strict=True):
            assert_equal_results(result, expected)


def _on_meshes() -> list[Result]:
    return [trained("sharded"), trained("sharded", mesh=(2, 2))]


def test_four_processes_prune_as_one_also_as_replicas_of_shards() -> None:
    """Four processes have uneven and some empty parts; a 2 x 2 mesh holds each part twice."""
    alone = trained("alone")
    for results in run(_on_meshes, 4):
        for result in results:
            assert_equal_results(result, alone)


def _mixed() -> list[Any]:
    """Frozen parameters, a parameter cut across its rows, and gradients that are not finite in one place."""
    inner = network()
    inner.up.bias.requires_grad_(False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    second = inner.mid[0].weight
    fully_shard(inner, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p is second else None)
    optimizer = sparsekern.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.01)
    pruner = sparsekern.Pruner(inner, optimizer, batch(0)[:1], keep=0.3, steps=STEPS, nonfinite="raise")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seen = None
    for step in range(STEPS):
        inner(batch(step, rank=rank, ranks=ranks)).square().mean().backward()
        if step == 3:
            kept = inner.head.weight.grad.to_local().clone()
            if rank == 0:
                inner.head.weight.grad.to_local().fill_(float("nan"))
            try:
                optimizer.step()
            except FloatingPointError as error:
                seen = str(error)
            inner.head.weight.grad.to_local().copy_(kept)
        optimizer.step()
        optimizer.zero_grad()
    return [seen, pruner.widths(), whole(inner.up.bias), [whole(p) for p in inner.parameters()]]


def _mixed_alone() -> list[Any]:
    inner = network()
    inner.up.bias.requires_grad_(False)
    optimizer = sparsekern.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=0.01)
    pruner = sparsekern.Pruner(inner, optimizer, batch(0)[:1], keep=0.3, steps=STEPS)
    for step in range(STEPS):
        inner(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [pruner.widths(), inner.up.bias.detach(), [p.detach() for p in inner.parameters()]]


def test_frozen_parameters_other_cuts_and_a_gradient_that_is_not_finite_on_one_rank() -> None:
    kept, bias, params = _mixed_alone()
    assert (bias == 0).any(), "the frozen parameter has masked rows"
    first, second = run(_mixed, 2)
    for message, its_kept, its_bias, its_params in (first, second):
        assert its_kept == kept
        torch.testing.assert_close(its_bias, bias, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(its_params, params, rtol=1e-9, atol=1e-12)
        assert message is not None
    assert "head.weight" in first[0]
    assert "parameters of other ranks" in second[0]


def _save(folder: Path) -> Result:
    training = start("sharded")
    training.train(range(STEPS // 2))
    model, states = get_state_dict(training.model, training.optimizer)
    dcp.save({"model": model, "optim": states, "pruner": training.pruner.state_dict()}, checkpoint_id=folder)
    training.train(range(STEPS // 2, STEPS))
    return training.result()


def _load(folder: Path, pruner_first: bool) -> Result:
    training = start("sharded")
    for param in training.inner.parameters():
        nn.init.constant_(param.detach().to_local(), 7.0)
    pruner = {"pruner": training.pruner.state_dict()}
    dcp.load(pruner, checkpoint_id=folder)
    if pruner_first:
        training.pruner.load_state_dict(pruner["pruner"])
    # Makes a step with a learning rate of 0, so that the optimizer has state.
    model, states = get_state_dict(training.model, training.optimizer)
    dcp.load({"model": model, "optim": states}, checkpoint_id=folder)
    set_state_dict(training.model, training.optimizer, model_state_dict=model, optim_state_dict=states)
    if not pruner_first:
        training.pruner.load_state_dict(pruner["pruner"])
    assert training.pruner.metrics()["step"] == STEPS // 2
    training.train(range(STEPS // 2, STEPS))
    return training.result()


def _load_in_both_orders(folder: Path) -> list[Result]:
    return [_load(folder, True), _load(folder, False)]


def test_saved_by_four_and_loaded_by_two(tmp_path: Path) -> None:
    undisturbed = run(_save, 4, tmp_path)[0]
    for results in run(_load_in_both_orders, 2, tmp_path):
        for result in results:
            assert_equal_results(result, undisturbed)


def _state_dict() -> dict[str, Any]:
    training = start("sharded")
    training.train(range(STEPS // 2))
    return training.pruner.state_dict() | {"params": [whole(p) for p in training.inner.parameters()]}


def test_the_pruners_state_is_that_of_one_process() -> None:
    """A sharded run can go on as one that is not; all ranks have the same state."""
    first, second = run(_state_dict, 2)
    for name, values in first["rows"].items():
        if isinstance(values, torch.Tensor):
            assert torch.equal(values, second["rows"][name])
    alone = start("alone")
    with torch.no_grad():
        for param, value in zip(alone.inner.parameters(), first.pop("params"), strict=True):
            param.copy_(value)
    alone.pruner.load_state_dict(first)
    assert alone.pruner.metrics()["step"] == STEPS // 2
    torch.testing.assert_close(alone.pruner.state_dict()["rows"]["threshold"], first["rows"]["threshold"])


def _copies() -> dict[str, Any]:
    """Compacting gives an ordinary module, and the sharded model can train on."""
    training = start("sharded")
    training.train(range(STEPS))
    with torch.no_grad():
        # Without a following backward pass the outermost module keeps its gathered parameters.
        expected = training.model(batch(0))
    hooks = len(training.inner._forward_pre_hooks)
    largest: list[int] = []
    gather = DTensor.full_tensor

    def counted(self: DTensor, **options: Any) -> torch.Tensor:
        largest.append(self.numel())
        return gather(self, **options)

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    small = training.pruner.compact()
    DTensor.full_tensor = gather  # type: ignore[method-assign]
    again = pickle.loads(pickle.dumps(small))
    numbers = [p.numel() for p in training.inner.parameters()]
    training.train(range(STEPS, STEPS + 2))
    return {
        "difference": float((again(batch(0)) - expected).abs().max()),
        "plain": not any(isinstance(p, DTensor) for p in small.parameters()),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small.modules()),
        "state dict": len(small.state_dict()) == len(network().state_dict()),
        "gathered": sorted(largest) == sorted(numbers),
        "kept hooks": len(training.inner._forward_pre_hooks) == hooks > 0,
        "sharded": type(training.inner).__name__,
        "params": sum(p.numel() for p in small.parameters()) < sum(numbers) / 2,
    }


def test_compact_gathers_one_tensor_at_a_time_and_gives_an_ordinary_module() -> None:
    for seen in run(_copies, 2):
        assert seen.pop("difference") < 1e-12
        assert seen.pop("hooks") == 0
        assert seen.pop("sharded") == "FSDPNet"
        assert all(seen.values()), seen


def _refusals() -> list[str]:
    messages = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    other = dist.DeviceMesh.from_group(groups[dist.get_rank()], "cpu", mesh=[dist.get_rank()])
    mixed = network()
    fully_shard(mixed.up, mesh=other)
    fully_shard(mixed, mesh=mesh)
    flattened = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    for model in (mixed, flattened):
        optimizer = sparsekern.optim.AdamW(model.parameters())
        try:
            sparsekern.Pruner(model, optimizer, batch(0)[:1], keep=0.3, steps=STEPS)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_added_up_is_refused() -> None:
    for mixed, flattened in run(_refusals, 2):
        assert mixed.startswith("model: got parameters sharded over different processes")
        assert flattened.startswith(
            "model: got a FullyShardedDataParallel as the model, which flattens parameters"
        )
