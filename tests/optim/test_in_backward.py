"""The step inside the backward pass equals ``step()`` bit for bit; unsupported uses are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim.cases import OptimizerFactory, assert_same, attached_table, network, snapshot
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import sparsekern
from sparsekern import optim


def pair(
    under: OptimizerFactory, **options: Any
) -> tuple[list[nn.Module], list[optim.RowOptimizer], list[Any]]:
    """The same network twice, the second one's optimizer working in the backward pass."""
    models = [network(), network()]
    optimizers = [under(model.parameters(), **options) for model in models]
    optim.in_backward(optimizers[1])
    return models, optimizers, [attached_table(optimizer) for optimizer in optimizers]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(5, 2, 4, 4, generator=generator)).square().mean()


def assert_pair(optimizers: list[Any], tables: list[Any]) -> None:
    assert_same(snapshot(optimizers[0], tables[0]), snapshot(optimizers[1], tables[1]))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_equals_step_bit_for_bit(under: OptimizerFactory, options: dict[str, Any], backend: str) -> None:
    models, optimizers, tables = pair(under, **options)
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_pair(optimizers, tables)


def test_masks_fades_and_penalties_too(under: OptimizerFactory) -> None:
    models, optimizers, tables = pair(under)
    if tables[0] is None:
        return
    for table in tables:
        table.countdown[:3] = torch.tensor([0, 3, 1], dtype=torch.int32)
        table.penalty[4:6] = 0.5
        table.refresh()
    for optimizer, table in zip(optimizers, tables, strict=True):
        optimizer._zero_masked(table)
    for step in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, step).backward()
            optimizer.step()
        optimizers[0].zero_grad()
        assert_pair(optimizers, tables)
    assert tables[1].countdown[:3].tolist() == [0, 0, 0]


def test_a_module_used_twice_and_groups_edited_between_steps() -> None:
    models = [network(), network()]
    made = [optim.AdamW([{"params": m[0].parameters()}, {"params": m[4].parameters()}]) for m in models]
    optim.in_backward(made[1])
    for step in range(4):
        for model, optimizer in zip(models, made, strict=True):
            optimizer.param_groups[1]["lr"] = 0.1 / (1 + step)
            (loss_of(model, step) + loss_of(model, step + 9)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_pair(made, [None, None])


def test_gradients_are_freed_and_their_stand_ins_hold_nothing() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optim.in_backward(optimizer)
    loss_of(model, 0).backward()
    grads = [param.grad for param in model.parameters()]
    assert all(isinstance(grad, optim.UsedGradient) for grad in grads)
    assert "UsedGradient(shape=[4, 2, 3, 3]" in repr(grads[0])
    optimizer.step()
    assert all(param.grad is None for param in model.parameters())


def test_what_comes_too_late_is_refused() -> None:
    model = network()
    optimizer = optim.AdamW(model.parameters())
    optim.in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="in_backward has used and freed"):
        clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="in_backward has used and freed"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="in_backward has used and freed"):
        loss_of(model, 1).backward()
    assert_same(before, snapshot(optimizer))
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"in_backward"):
        scaler.step(optimizer)


def test_bad_optimizers_are_refused() -> None:
    model = network()
    with pytest.raises(TypeError, match="optimizer: got Adam, expected one of sparsekern.optim"):
        optim.in_backward(torch.optim.Adam(model.parameters()))  # type: ignore[arg-type]
    optimizer = optim.Adam(model.parameters())
    handle = optim.in_backward(optimizer)
    with pytest.raises(RuntimeError, match="works in the backward pass already"):
        optim.in_backward(optimizer)
    handle.remove()
    optim.in_backward(optimizer).remove()


def test_after_remove_the_step_does_it_all() -> None:
    model, other = network(), network()
    optimizer, plain = optim.Adam(model.parameters()), optim.Adam(other.parameters())
    handle = optim.in_backward(optimizer)
    for step in range(4):
        if step == 2:
            handle.remove()
        loss_of(model, step).backward()
        assert all(isinstance(p.grad, optim.UsedGradient) == (step < 2) for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        loss_of(other, step).backward()
        plain.step()
        plain.zero_grad()
    assert_pair([plain, optimizer], [None, None])


def test_a_bad_gradient_changes_nothing_of_its_parameter() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optim.in_backward(optim.SGD([param], lr=0.1))
    with pytest.raises(RuntimeError, match="complex dtype"):
        param.abs().sum().backward()
    assert_same([param.detach()], [torch.ones(3, dtype=torch.complex64)])


def test_state_dicts_and_copies_go_on_without_it() -> None:
    model = network()
    optimizer = optim.AdamW(model.parameters())
    optim.in_backward(optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    fresh = optim.AdamW(twin.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, steps in ((model, optimizer), (twin, fresh)):
        loss_of(one, 1).backward()
        steps.step()
    assert_pair([fresh, optimizer], [None, None])


def test_a_pruner_prunes_as_without_it() -> None:
    def train(inside: bool) -> Any:
        model = network()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        example = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        pruner = sparsekern.Pruner(model, optimizer, example, keep=0.5, steps=30, events=3)
        if inside:
            optim.in_backward(optimizer)
        for step in range(30):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert pruner.finished
        return [p.detach() for p in pruner.compact().parameters()]

    assert_same(train(False), train(True))
