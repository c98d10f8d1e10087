"""``depth=True``: the Pruner removes whole blocks besides channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from graph.block_networks import ResNet, Transformer, images, tokens
from torch import Tensor, nn

import sparsekern
from sparsekern import Pruner, prune_once

STEPS = 16


def made(shrink: bool, ours: bool = True, **options: Any) -> tuple[Transformer, Any, Pruner]:
    torch.manual_seed(0)
    model = Transformer(4).double()
    kind = sparsekern.optim.AdamW if ours else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-2)
    options = {"keep": 0.45, "events": 3, "round_to": 1, "depth": True} | options
    return model, optimizer, Pruner(model, optimizer, tokens(), steps=STEPS, shrink=shrink, **options)


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = (tokens() * 5 + step) % 16
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


def train(model: nn.Module, optimizer: Any, first: int = 0, last: int = STEPS) -> list[float]:
    losses = []
    for step in range(first, last):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ours", [True, False], ids=["fused", "torch"])
def test_a_shrunk_training_equals_the_masked_one(ours: bool) -> None:
    masked, optimizer, pruner = made(False, ours)
    losses = train(masked, optimizer)
    live, cut, shrinking = made(True, ours)
    assert train(live, cut) == pytest.approx(losses, abs=1e-12)
    assert pruner.widths() == shrinking.widths() and pruner.widths()["layers"] < (4, 4)
    assert pruner.finished and pruner.metrics()["macs_share"] == shrinking.metrics()["macs_share"] <= 0.45
    assert pruner.plan() == shrinking.plan()
    small = pruner.compact()
    with torch.no_grad():
        assert (small(tokens()) - masked(tokens())).abs().max() < 1e-12
        assert (live(tokens()) - masked(tokens())).abs().max() < 1e-12
    assert len(small.layers) == len(live.layers) == live.config.num_hidden_layers < 4
    assert (
        set(cut.state) == {p for group in cut.param_groups for p in group["params"]} == set(live.parameters())
    )
    assert torch.equal(small.generate(tokens(), 4), masked.generate(tokens(), 4))


@pytest.mark.parametrize("shrink", [False, True], ids=["masked", "shrunk"])
def test_a_resumed_training_goes_on_bit_by_bit(shrink: bool, tmp_path: Path) -> None:
    model, optimizer, pruner = made(shrink)
    for step in (6, 11):
        train(model, optimizer, 0 if step == 6 else 6, step)
        pruner.save_checkpoint(tmp_path / f"{step}")
    losses = train(model, optimizer, 11)
    for step in (6, 11):
        again, other, resumed = made(shrink)
        resumed.load_checkpoint(tmp_path / f"{step}")
        assert train(again, other, step)[-len(losses) :] == losses
        assert resumed.widths() == pruner.widths()
        for name, own in again.state_dict().items():
            assert torch.equal(own, model.state_dict()[name])


@pytest.mark.parametrize("select", [None, "magnitude"])
def test_blocks_and_the_residual_stream_of_a_resnet_together(select: str | None) -> None:
    results = []
    for shrink in (False, True):
        torch.manual_seed(0)
        model = ResNet(nn.ReLU).double()
        optimizer = sparsekern.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        ema = copy.deepcopy(model)
        options = {"keep": 0.3, "events": 4, "round_to": 1, "depth": True, "select": select, "also": [ema]}
        pruner = Pruner(model, optimizer, images(), steps=STEPS, shrink=shrink, **options)
        for step in range(STEPS):
            (model(images() + step / 10) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert pruner.finished and pruner.metrics()["macs_share"] <= 0.3
        small = pruner.compact()
        with torch.no_grad():
            for training in (True, False):
                out = copy.deepcopy(model).train(training)(images())
                assert (copy.deepcopy(small).train(training)(images()) - out).abs().max() < 1e-12
        results.append((pruner.widths(), model.eval()(images())))
    assert results[0][0] == results[1][0]
    assert (results[0][1] - results[1][1]).abs().max() < 1e-10
    assert select or sum(results[0][0][f"stage{n}"][0] for n in (1, 2)) < 4


def test_restored_blocks_are_live_again() -> None:
    model, optimizer, pruner = made(False, events=1, warmup=0.3)
    train(model, optimizer, 0, 6)
    fading = pruner.metrics()["condemned"]
    assert fading and pruner.abort() == fading
    train(model, optimizer, 6)
    assert pruner.widths()["layers"] == (4, 4)


def test_a_list_keeps_as_many_modules_as_it_has_to() -> None:
    for keep, least in ((0.2, 1), (0.5, 3)):
        model, optimizer, pruner = made(True, keep=keep, min_channels={"layers": least})
        train(model, optimizer)
        assert pruner.finished and least <= len(model.layers) < 4


def test_one_shot_pruning_removes_blocks() -> None:
    torch.manual_seed(0)
    model = Transformer(5).double().eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name in ("attention.proj", "down"):
            for tensor in model.layers[2].get_submodule(name).parameters():
                tensor.mul_(1e-9)
            before = copy.deepcopy(model.state_dict())
    small, plan = prune_once(model, tokens(), keep=0.85, select="magnitude", depth=True)
    assert 2 not in plan.blocks["layers"].keep and len(small.layers) == small.config.num_hidden_layers
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert not prune_once(model, tokens(), keep=0.85, select="magnitude").plan.blocks


def test_written_weights_of_a_removed_block_are_found() -> None:
    model, optimizer, pruner = made(False)
    train(model, optimizer)
    gone = pruner.plan().blocks["layers"].keep
    number = next(n for n in range(4) if n not in gone)
    with torch.no_grad():
        model.layers[number].down.bias.add_(1)
    with pytest.raises(RuntimeError, match="masked rows: got"):
        pruner.compact()
    assert pruner.remask() == 8
    with torch.no_grad():
        assert (pruner.compact()(tokens()) - model(tokens())).abs().max() < 1e-12


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="depth: got 1, expected True or False"):
        made(False, depth=1)
    with pytest.raises(ValueError, match="depth: got True with of='latency'"):
        made(False, of="latency")
    state = made(False, keep=0.7)[2].state_dict()
    with pytest.raises(ValueError, match="state: got the channels of another network"):
        made(False, keep=0.7, depth=False)[2].load_state_dict(state)
