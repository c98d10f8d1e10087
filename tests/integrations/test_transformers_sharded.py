"""Under FSDP2 the model that the Trainer's loop holds becomes a smaller one after an event."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.training import ARGUMENTS, STEPS, batch, loss_of, network
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers, which imports torchvision

# isort: split

from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from benchmarks.processes import run
from sparsekern.integrations.transformers import PruningCallback

ARGS: Any = SimpleNamespace(load_best_model_at_end=False, device=torch.device("cpu"))


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.get_submodule("up"), mesh=mesh)
    fully_shard(model, mesh=mesh)


def trained(cuts: bool) -> dict[str, Any]:
    """A loop that holds the model from beginning to end, and calls the callback as the Trainer does."""
    model = network()
    shard(model)
    params = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    callback = PruningCallback(batch(0)[:1], shard=shard if cuts else None, **ARGUMENTS)
    state, control = TrainerState(max_steps=STEPS), TrainerControl()
    handler = CallbackHandler([callback], model, None, optimizer, None)
    handler.on_init_end(ARGS, state, control)
    handler.on_train_begin(ARGS, state, control)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step, rank=dist.get_rank(), ranks=dist.get_world_size()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        model.zero_grad()
        control = handler.on_step_end(ARGS, state, control)
        losses.append(loss.item())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert callback.pruner is not None
    small = callback.compact()
    return {
        "losses": losses,
        "share": sum(p.numel() for p in model.parameters()) / params,
        "trained": all(id(p) in held for p in model.parameters()),
        "saved": {name: tuple(value.shape) for name, value in get_model_state_dict(model).items()},
        "compact": {name: tuple(value.shape) for name, value in small.state_dict().items()},
        "apart": (loss_of(model.eval(), batch(0)) - loss_of(small.eval(), batch(0))).abs().item(),
    }


def every() -> dict[bool, dict[str, Any]]:
    return {cuts: trained(cuts) for cuts in (False, True)}


def test_the_loop_trains_the_smaller_model_as_the_masked_one() -> None:
    for result in run(every, 2):
        masked, cut = result[False], result[True]
        np.testing.assert_allclose(cut["losses"], masked["losses"], rtol=1e-12)
        assert masked["share"] == 1 and cut["share"] < 0.6
        assert cut["trained"] and cut["saved"] == cut["compact"]
        assert cut["apart"] < 1e-12


def test_a_checkpoint_is_refused() -> None:
    model = network()
    callback = PruningCallback(batch(0)[:1], shard=shard, **ARGUMENTS)
    state = TrainerState(max_steps=STEPS, stateful_callbacks={"sparsekern.pruner": "saved"})
    handler = CallbackHandler([callback], model, None, torch.optim.AdamW(model.parameters()), None)
    handler.on_init_end(ARGS, state, TrainerControl())
    model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="resume_from_checkpoint: got one for a callback with shard="):
        handler.on_train_begin(ARGS, state, TrainerControl())
