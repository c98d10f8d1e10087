"""A model sharded by ``fully_shard`` is replaced by a smaller one, and trains on as the masked one would."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.training import STEPS, Run, start, whole
from graph.residual import Language, WrittenOut
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import sparsekern
from benchmarks.processes import run
from benchmarks.reshard import Peak
from sparsekern.nn.held_factor import holds_factors

BEFORE, AFTER = 5, 8  # steps of the checkpoints: channels are masked and not cut yet, and cut


def shard(model: nn.Module, shape: tuple[int, ...] = ()) -> None:
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def failing(model: nn.Module) -> None:
    """One process fails after it has sharded, the others do not."""
    shard(model)
    if dist.get_rank() == 1:
        raise LookupError("of the user")


def raised(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def tensors(own: Run) -> dict[str, Tensor]:
    """Whole parameters, state and running statistics by name."""
    found: dict[str, Tensor] = dict(own.inner.named_buffers())
    for name, param in own.inner.named_parameters():
        found[name] = whole(param)
        found |= {f"{name}.{key}": whole(value) for key, value in own.optimizer.state[param].items()}
    return {name: value.clone() for name, value in found.items()}


def kept_of(every: dict[str, Tensor], plan: sparsekern.Plan) -> dict[str, Tensor]:
    """The tensors cut by a plan, each in the way of its parameter."""
    found = {}
    for name, value in every.items():
        parameter = name.rpartition(".")[0] if name not in plan.tensors else name
        part = plan.tensors.get(parameter)
        for dim, indices in part.keep.items() if part is not None and value.dim() else ():
            value = value.index_select(dim, torch.from_numpy(np.array(indices)))
        found[name] = value
    return found


def save(own: Run, folder: Path) -> None:
    if own.rank == 0:
        folder.mkdir()
        torch.save(own.pruner.state_dict(), folder / "pruner.pt")
    dist.barrier()
    weights, moments = get_state_dict(own.model, own.optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def resumed(folder: Path, step: int) -> list[float]:
    own = start("sharded", optimizer="torch AdamW")
    schedule(own, step)
    state = torch.load(folder / "pruner.pt", weights_only=True)
    own.model, _ = own.pruner.reshard(shard, state)
    weights, moments = get_state_dict(own.model, own.optimizer)
    loaded = {"model": weights, "optimizer": moments}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(own.model, own.optimizer, model_state_dict=weights, optim_state_dict=moments)
    train(own, range(step, STEPS), schedule(own, step))
    return own.losses


def schedule(own: Run, done: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
    for group in own.optimizer.param_groups:
        group["initial_lr"] = 0.01
    return torch.optim.lr_scheduler.LambdaLR(own.optimizer, lambda step: 0.8**step, last_epoch=done - 1)


def train(own: Run, steps: range, rates: torch.optim.lr_scheduler.LambdaLR, *, cut: bool = True) -> None:
    for step in steps:
        own.train(range(step, step + 1))
        rates.step()
        if cut:
            own.model, _ = own.pruner.reshard(shard)
            own.inner = own.model  # type: ignore[assignment]


def convolutional(folder: Path) -> dict[str, Any]:
    """A UNet's level, an external optimizer and a scheduler; checkpoints and a shard function that fails."""
    masked = start("sharded", optimizer="torch AdamW")
    train(masked, range(STEPS), schedule(masked), cut=False)
    own = start("sharded", optimizer="torch AdamW")
    rates, group = schedule(own), own.optimizer.param_groups[0]
    seen: dict[str, Any] = {"nothing masked": own.pruner.reshard(shard)[0] is own.model}
    own.inner.stem.note = "kept"  # type: ignore[assignment]
    seen["calls"] = calls = []
    own.inner.head.register_forward_hook(lambda *_: calls.append(1))
    for step in range(STEPS):
        train(own, range(step, step + 1), rates, cut=False)
        former, whole_before = own.model, tensors(own) if step + 1 == BEFORE else {}
        if step + 1 == BEFORE:
            save(own, folder / "before")
            plan = own.pruner.plan()
            seen["failing"] = raised(own.pruner.reshard, failing)
            seen["unsharded"] = raised(own.pruner.reshard, lambda model: None)
            seen["another"] = raised(own.pruner.reshard, lambda model: nn.Linear(2, 2))
            seen["no function"] = raised(own.pruner.reshard, None)
            after = tensors(own)
            seen["unchanged"] = all(torch.equal(after[name], whole_before[name]) for name in after)
        own.model, optimizer = own.pruner.reshard(shard)
        own.inner = own.model  # type: ignore[assignment]
        seen["same optimizer"] = optimizer is own.optimizer and optimizer.param_groups[0] is group
        if whole_before:
            cut = kept_of(whole_before, plan)
            now = tensors(own)
            seen["bits"] = [name for name in cut if not torch.equal(cut[name], now[name])]
            seen["names"] = cut.keys() == now.keys() and any(n.endswith("exp_avg_sq") for n in now)
            seen["former"] = raised(former, torch.zeros(1, 3, 8, 8).double())
        if step + 1 == AFTER:
            save(own, folder / "after")
    small = own.pruner.compact()
    return seen | {
        "note": own.inner.stem.note,
        "losses": own.losses,
        "expected": masked.losses,
        "before": resumed(folder / "before", BEFORE),
        "after": resumed(folder / "after", AFTER),
        "rate": group["lr"],
        "widths": own.pruner.widths() == masked.pruner.widths(),
        "finished": own.pruner.finished,
        "compact": [param.detach() for param in small.parameters()],
        "masked compact": [param.detach() for param in masked.pruner.compact().parameters()],
        "plain": not any(isinstance(param, DTensor) for param in small.parameters()),
    }


def language(cut: bool) -> list[float]:
    """A tied embedding, norms that hold a factor for the channels that they lost, and a mesh of replicas."""
    torch.manual_seed(0)
    model: nn.Module = Language(lambda size: WrittenOut(size, 1.0), size=16, tied=True).double()
    again = functools.partial(shard, shape=(1, dist.get_world_size()))
    again(model)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=3e-3)
    batches = torch.randint(0, 7, (STEPS, 4, 6), generator=torch.Generator().manual_seed(0))
    pruner = sparsekern.Pruner(
        model, optimizer, batches[0][:, :-1], keep=0.4, of="params", steps=STEPS, events=2, finish=0.6
    )
    losses = []
    for tokens in batches:
        mine = tokens[dist.get_rank() :: dist.get_world_size()]
        logits = model(mine[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if cut:
            model, optimizer = pruner.reshard(again)
    if cut:
        assert model.norm.weight.shape[0] < 16 and holds_factors(model)
        assert len({id(param) for param in model.parameters()}) == len(list(model.parameters()))
        assert not holds_factors(pruner.compact())
    return losses


def wide() -> tuple[nn.Module, sparsekern.Pruner]:
    """Widths that dominate everything else, with masked channels and gradients."""
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(64, 1400), nn.ReLU(), nn.Linear(1400, 1001), nn.ReLU(), nn.Linear(1001, 8)
    )
    shard(inner)
    optimizer = sparsekern.optim.AdamW(inner.parameters(), lr=1e-3)
    x = torch.randn(4, 64)
    pruner = sparsekern.Pruner(inner, optimizer, x, keep=0.7, steps=8, events=1, warmup=0.3, finish=0.5)
    for _ in range(5):
        inner(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    inner(x).square().mean().backward()
    return inner, pruner


def memory() -> dict[str, Any]:
    """The most memory of a cut, and whether gradients are cut with the parameters."""
    inner, pruner = wide()
    grads = {name: whole(param.grad) for name, param in inner.named_parameters()}
    cut, largest = kept_of(grads, pruner.plan()), max(param.numel() * 4 for param in inner.parameters())
    with Peak() as peak:
        model, _ = pruner.reshard(shard)
    now = {name: whole(param.grad) for name, param in model.named_parameters()}
    return {
        "peak": peak.above,
        "largest": largest,
        "gradients": all(torch.equal(cut[name], now[name]) for name in now),
        "smaller": model[2].weight.shape[0] < 1001,
    }


def every(folder: Path) -> dict[str, Any]:
    return {
        "convolutional": convolutional(folder),
        "language": (language(False), language(True)),
        "memory": memory(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(every, 2, tmp_path_factory.mktemp("reshard"))


def test_losses_widths_and_the_compact_model_are_those_of_the_masked_training(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        own = result["convolutional"]
        np.testing.assert_allclose(own["losses"], own["expected"], rtol=1e-12)
        assert own["widths"] and own["finished"] and own["plain"]
        torch.testing.assert_close(own["compact"], own["masked compact"], rtol=1e-12, atol=1e-15)


def test_tied_weights_and_norms_over_fewer_channels(results: list[dict[str, Any]]) -> None:
    for result in results:
        np.testing.assert_allclose(result["language"][1], result["language"][0], rtol=1e-10)


def test_optimizer_state_and_gradients_are_the_kept_slices(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["convolutional"]["bits"] == [] and result["convolutional"]["names"]
        assert result["memory"]["gradients"] and result["memory"]["smaller"]


def test_schedulers_hooks_and_attributes_go_on(results: list[dict[str, Any]]) -> None:
    for result in results:
        own = result["convolutional"]
        assert own["same optimizer"] and own["rate"] == pytest.approx(0.01 * 0.8**STEPS)
        assert own["note"] == "kept" and len(own["calls"]) >= STEPS


def test_no_process_holds_more_than_a_tensor_above_its_share(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert 0 < result["memory"]["peak"] <= result["memory"]["largest"]


def test_checkpoints_before_and_after_a_cut(results: list[dict[str, Any]]) -> None:
    for result in results:
        own = result["convolutional"]
        np.testing.assert_allclose(own["before"], own["expected"][BEFORE:], rtol=1e-12)
        np.testing.assert_allclose(own["after"], own["expected"][AFTER:], rtol=1e-12)


def test_an_error_leaves_the_former_model_in_use_in_all_processes(results: list[dict[str, Any]]) -> None:
    first, second = (result["convolutional"] for result in results)
    assert first["failing"].startswith("RuntimeError: sharding the smaller model: rank 1 failed")
    assert second["failing"] == "LookupError: of the user"
    for own in (first, second):
        assert own["nothing masked"] and own["unchanged"]
        assert own["unsharded"].startswith("ValueError: shard: got a model whose")
        assert own["another"].startswith("ValueError: shard: got a Linear from it")
        assert own["no function"].startswith("TypeError: shard: got NoneType")
        assert own["former"].startswith("RuntimeError: model: got a forward pass of the model before")


def test_a_model_that_is_not_sharded_is_refused() -> None:
    own = start("alone")
    with pytest.raises(ValueError, match="model: got a Net that fully_shard has not sharded"):
        own.pruner.reshard(shard)
