"""Masked channels that are constants: no step moves the columns that read them, so masked equals compact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constant_functions import CONSTANTS, Gated, Joined, Net, SharedHeads, StarReLU
from graph.exactness import mask, randomise
from prune.networks import batch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern
from sparsekern import Pruner
from sparsekern.prune.state.masking import MASKED

STEPS = 24
DOUBLE = torch.float64
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sparsekern.AdamW": lambda params: sparsekern.optim.AdamW(params, lr=3e-3, weight_decay=0.1),
    "sparsekern.SGD": lambda params: sparsekern.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "torch.AdamW": lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1),
    "torch.SGD": lambda params: torch.optim.SGD(
        params, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True
    ),
    "torch.RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
}
OURS = OPTIMIZERS["sparsekern.AdamW"]
Parts = tuple[nn.Module, torch.optim.Optimizer, Pruner]


def parts(
    make: Callable[[Any], torch.optim.Optimizer] = OURS,
    network: Callable[[], nn.Module] = Net,
    seed: int = 0,
    **options: Any,
) -> Parts:
    torch.manual_seed(seed)
    model = network().double()
    optimizer = make(model.parameters())
    defaults: dict = {"keep": 0.3, "steps": STEPS, "events": 3, "round_to": 1}
    return model, optimizer, Pruner(model, optimizer, batch(0, dtype=DOUBLE), **(defaults | options))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, clip: float = 0.05
) -> list[float]:
    """Train with gradients clipped by the norm of them all, which counts gradients of masked columns."""
    losses = []
    for step in steps:
        loss = (model(batch(step, dtype=DOUBLE)) - 1).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def nonzero_columns(model: nn.Module, pruner: Pruner) -> int:
    """The number of masked columns that are not zero, counted independently of the package."""
    parameters, count, masked = dict(model.named_parameters()), 0, 0
    for name, dim in {column for group in pruner.graph.groups for column in group.masked_columns}:
        channels = pruner.graph.tensors[name].channels[dim]
        gone = np.flatnonzero((channels >= 0) & (pruner._network.masks.state[channels] == MASKED))
        masked += len(gone)
        count += int(parameters[name].movedim(dim, 0)[gone].flatten(1).any(1).sum())
    assert masked
    return count


def assert_exact(model: nn.Module, pruner: Pruner) -> None:
    assert not nonzero_columns(model, pruner)
    assert sparsekern.verify(model, pruner.compact(), batch(99, dtype=DOUBLE)) < 1e-12


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer_leaves_the_columns_at_zero(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model, optimizer, pruner = parts(make)
    train(model, optimizer, range(STEPS))
    assert pruner.finished
    assert_exact(model, pruner)
    for name, dim in pruner.graph.groups[0].masked_columns:
        weight = dict(model.named_parameters())[name]
        gone = np.flatnonzero(pruner._network.masks.state[pruner.graph.tensors[name].channels[dim]] == MASKED)
        for value in optimizer.state[weight].values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert value.any() and not value.movedim(dim, 0)[gone].any()


@pytest.mark.parametrize("act", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_masked_equals_compact_for_every_constant(act: Callable[[], nn.Module]) -> None:
    model, optimizer, pruner = parts(network=lambda: Net(act), events=2, steps=12)
    train(model, optimizer, range(12))
    assert pruner.finished
    assert_exact(model, pruner)


@pytest.mark.parametrize(
    ("network", "make"),
    [
        *((Net, make) for make in list(OPTIMIZERS.values())[:4]),
        (lambda: Net(StarReLU), OURS),
        (Gated, OPTIMIZERS["torch.AdamW"]),
        (SharedHeads, OURS),
    ],
    ids=[*list(OPTIMIZERS)[:4], "star", "gated", "shared heads"],
)
def test_a_training_with_shrink_is_the_masked_one_to_rounding(
    network: Callable[[], nn.Module], make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    runs = []
    for shrink in (False, True):
        model, optimizer, pruner = parts(make, network, shrink=shrink)
        runs.append((train(model, optimizer, range(STEPS + 6)), model, pruner.metrics()))
    (masked, big, metrics), (shrunk, small, its_metrics) = runs
    np.testing.assert_allclose(shrunk, masked, rtol=1e-10)
    assert metrics == its_metrics and metrics["macs_share"] <= 0.3
    assert sparsekern.verify(big, small, batch(99, dtype=DOUBLE)) < 1e-10


@pytest.mark.parametrize(
    ("stop", "shrink", "make"),
    [(17, False, OURS), (11, True, OURS), (11, False, OPTIMIZERS["torch.SGD"])],
    ids=["fused", "shrunk", "hooks"],
)
def test_a_resumed_run_is_bit_identical(
    stop: int, shrink: bool, make: Callable[[Any], torch.optim.Optimizer], tmp_path: Path
) -> None:
    model, optimizer, pruner = parts(make, shrink=shrink)
    train(model, optimizer, range(stop))
    pruner.save_checkpoint(tmp_path / "checkpoint.pt")
    train(model, optimizer, range(stop, STEPS))
    resumed, its_optimizer, its_pruner = parts(make, seed=1, shrink=shrink)
    its_pruner.load_checkpoint(tmp_path / "checkpoint.pt")
    train(resumed, its_optimizer, range(stop, STEPS))
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert its_pruner.metrics() == pruner.metrics()


NETWORKS = {name: (lambda act=act: Net(act)) for name, act in CONSTANTS.items()} | {"joined": Joined}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_output_does_not_jump_when_constants_are_masked(network: Callable[[], nn.Module]) -> None:
    model, _, pruner = parts(network=network)
    randomise(model).eval()
    masks, x = pruner._network.masks, batch(5, dtype=DOUBLE)
    chosen = np.arange(pruner.graph.num_channels) % 2 == 0
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, slots in pruner.graph.tensors.items():
            channels = None if slots.row_dim is None else slots.channels[slots.row_dim]
            if channels is not None:
                gone = np.flatnonzero((channels >= 0) & chosen[channels])
                parameters[name].index_fill_(slots.row_dim, torch.from_numpy(gone), 0.0)
        before, alone = model(x), mask(model, pruner.graph, ~chosen)
        assert (alone(x) - before).abs().max() > 1e-3
        masks.take_over(chosen)
        masks.mask(chosen)
        assert (model(x) - before).abs().max() < 1e-12
    assert not nonzero_columns(model, pruner)


def test_a_step_in_the_backward_pass_is_the_same() -> None:
    runs = []
    for inside in (False, True):
        model, optimizer, pruner = parts()
        if inside:
            sparsekern.optim.in_backward(optimizer)
        for step in range(STEPS):
            (model(batch(step, dtype=DOUBLE)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_exact(model, pruner)
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_loads_leave_the_columns_at_zero() -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(STEPS))
    dense, other, _ = parts()
    train(dense, other, range(1))
    model.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(other.state_dict())
    assert_exact(model, pruner)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(dense.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(model, optimizer, range(3))
    assert_exact(model, pruner)


def test_a_written_column_is_an_error_until_remask(tmp_path: Path) -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(STEPS))
    with torch.no_grad():
        model.body[0].weight.add_(0.1)
    count = nonzero_columns(model, pruner)
    assert count
    for act in (pruner.compact, pruner.plan, pruner.shrink, lambda: pruner.save_checkpoint(tmp_path / "c")):
        with pytest.raises(RuntimeError, match=rf"masked rows: got \d+ .*stem.0 \({count}\).*remask"):
            act()
    assert pruner.remask() >= count
    assert_exact(model, pruner)


def test_a_gradient_written_by_hand_is_found() -> None:
    model, optimizer, pruner = parts()
    train(model, optimizer, range(STEPS))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="masked rows"):
        pruner.compact()
    assert pruner.remask()
    assert_exact(model, pruner)


def test_a_frozen_reader_that_is_trained_later_stays_masked() -> None:
    model, optimizer, pruner = parts()
    model.body[0].weight.requires_grad_(False)
    train(model, optimizer, range(STEPS))
    assert not model.body[0].weight.requires_grad
    model.body[0].weight.requires_grad_(True)
    train(model, optimizer, range(4))
    assert_exact(model, pruner)


def test_a_captured_graph_reads_later_masks() -> None:
    model, optimizer, pruner = parts()
    with pruner.capturing():
        train(model, optimizer, range(1))
    hooked = {name: dict(p._backward_hooks) for name, p in model.named_parameters() if p._backward_hooks}
    assert set(hooked) == {"body.0.weight", "bare.0.weight", "head.weight"}
    flags = pruner._network.masks._columns._flags[0]
    assert not flags.any()
    train(model, optimizer, range(STEPS))
    # A replay reads the same memory as the capture.
    assert flags.any() and flags.shape == (1, 8, 1, 1)
    assert pruner._network.masks._columns._flags[0] is flags
    assert_exact(model, pruner)


def test_copies_have_no_hooks_and_detach_removes_them() -> None:
    model, optimizer, pruner = parts()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    train(model, optimizer, range(STEPS))
    weight = model.body[0].weight
    assert weight._backward_hooks
    for other in (copy.deepcopy(model), pruner.compact(), average.module):
        assert not other.body[0].weight._backward_hooks
    pruner.detach()
    assert not weight._backward_hooks
    train(model, optimizer, range(2))
    assert nonzero_columns(model, pruner)


def test_averages_given_to_the_pruner_are_masked_with_the_model() -> None:
    torch.manual_seed(0)
    model = Net().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = OURS(model.parameters())
    pruner = Pruner(model, optimizer, batch(0, dtype=DOUBLE), keep=0.3, steps=STEPS, events=3, also=[average])
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    small = sparsekern.compact(average.module, pruner.plan())
    assert sparsekern.verify(average.module, small, batch(99, dtype=DOUBLE)) < 1e-12


def test_an_event_that_fails_leaves_the_columns_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner = parts(shrink=True)
    due = [step for step in range(STEPS) if step in {e.step for e in pruner._events.schedule.events}]
    train(model, optimizer, range(due[1] - 1))
    shapes = [tuple(p.shape) for p in model.parameters()]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(type(pruner._network), "shrink", fail)
        with pytest.raises(OSError, match="stop"):
            train(model, optimizer, range(due[1] - 1, due[1]))
    assert not any(p._backward_hooks for p in model.parameters())
    assert shapes == [tuple(p.shape) for p in model.parameters()]
    train(model, optimizer, range(due[1], STEPS + 2))
    assert sparsekern.verify(model, pruner.compact(), batch(99, dtype=DOUBLE)) < 1e-12
