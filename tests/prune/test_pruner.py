"""The Pruner in a training: budgets, exactness, and combinations with other tools."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from prune.networks import Plain, Residual, batch, train
from torch import nn

import sparsekern
from sparsekern import Pruner
from sparsekern.prune.state.masking import MASKED

STEPS = 30

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sparsekern.SGD": lambda params: sparsekern.optim.SGD(params, lr=0.05, momentum=0.9),
    "sparsekern.Adam": lambda params: sparsekern.optim.Adam(params, lr=1e-3),
    "sparsekern.AdamW": lambda params: sparsekern.optim.AdamW(params, lr=1e-3),
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "torch.AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "torch.RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
    "torch.NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def make_optimizer(request: pytest.FixtureRequest) -> Callable[[list], torch.optim.Optimizer]:
    return request.param


def pruned(
    model: nn.Module, make: Callable[[list], torch.optim.Optimizer], steps: int = STEPS, **options: object
) -> Pruner:
    """A Pruner after ``steps`` steps of a training of that many."""
    optimizer = make(list(model.parameters()))
    dtype = next(model.parameters()).dtype
    defaults: dict = {"keep": 0.3, "steps": steps, "events": 4}
    pruner = Pruner(model, optimizer, batch(0, dtype=dtype), **(defaults | options))
    train(model, optimizer, range(steps), dtype)
    return pruner


def adamw(params: list) -> torch.optim.Optimizer:
    return sparsekern.optim.AdamW(params, lr=1e-3)


@pytest.mark.parametrize("network", [Plain, Residual])
def test_compact_equals_masked_with_any_optimizer(
    network: type[nn.Module], make_optimizer: Callable[[list], torch.optim.Optimizer]
) -> None:
    torch.manual_seed(0)
    model = network().double()
    pruner = pruned(model, make_optimizer)
    assert pruner.finished
    small = pruner.compact()
    assert sparsekern.verify(model, small, batch(99, dtype=torch.float64)) < 1e-12
    metrics = pruner.metrics()
    assert metrics["macs_share"] <= 0.3
    assert sum(p.numel() for p in small.parameters()) == metrics["params"]


@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_budget_is_met_in_either_unit(of: str) -> None:
    metrics = pruned(Plain(), adamw, of=of, keep=0.25).metrics()
    assert 0.15 < metrics[f"{of}_share"] <= 0.25


def test_masks_stay_and_training_goes_on_after_them() -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = adamw(list(model.parameters()))
    pruner = Pruner(model, optimizer, batch(0), keep=0.3, steps=STEPS, events=4)
    train(model, optimizer, range(STEPS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = pruner._network.masks.state.copy()
    train(model, optimizer, range(STEPS, STEPS + 5))
    assert (pruner._network.masks.state == state).all()
    masked = state == MASKED
    for name, slots in pruner.graph.tensors.items():
        if slots.kind != "parameter" or slots.row_dim is None:
            continue
        channels = slots.channels[slots.row_dim]
        if channels is None:
            continue
        gone = np.flatnonzero((channels >= 0) & masked[channels])
        param = dict(model.named_parameters())[name]
        assert not param.movedim(slots.row_dim, 0)[gone].any()
        assert not torch.equal(param, before[name])


def test_gates_of_fading_channels_fall_linearly() -> None:
    torch.manual_seed(0)
    model = Plain()
    # With a learning rate that small, only fading moves a gate.
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=1e-12)
    pruner = Pruner(
        model, optimizer, batch(0), keep=0.5, steps=20, events=1, warmup=0.25, finish=0.75, penalty=0.0
    )
    train(model, optimizer, range(5))
    fading = np.flatnonzero(pruner._network.masks.state == 1)
    stem = next(group for group in pruner.graph.groups if "stem" in group.name)
    channel = int(np.intersect1d(fading, stem.channels)[0]) - int(stem.channels[0])
    seen = [float(model.stem[1].weight[channel].detach())]
    for step in range(5, 15):
        train(model, optimizer, range(step, step + 1))
        seen.append(float(model.stem[1].weight[channel].detach()))
    np.testing.assert_allclose(seen, np.linspace(1, 0, 11), atol=1e-5)
    assert seen[-1] == 0
    assert not model.stem[0].weight[channel].any()


def test_keep_one_changes_nothing() -> None:
    torch.manual_seed(0)
    model, plain = Plain(), Plain()
    plain.load_state_dict(model.state_dict())
    optimizer, other = adamw(list(model.parameters())), adamw(list(plain.parameters()))
    pruner = Pruner(model, optimizer, batch(0), keep=1.0, steps=10)
    train(model, optimizer, range(10))
    train(plain, other, range(10))
    assert pruner.metrics()["macs_share"] == 1
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_model_is_left_as_it_was_at_construction() -> None:
    torch.manual_seed(0)
    model = Plain().train()
    model.body.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    Pruner(model, adamw(list(model.parameters())), batch(0), keep=0.5, steps=10)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training
    assert not model.body.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradient_scaler_and_its_skipped_steps() -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = adamw(list(model.parameters()))
    pruner = Pruner(model, optimizer, batch(0), keep=0.3, steps=STEPS, events=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=7)
    for step in range(STEPS + 12):
        loss = model(batch(step)).square().mean()
        if step in (8, 12, 17):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert pruner.finished
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert pruner.metrics()["macs_share"] <= 0.3
    assert sparsekern.verify(model, pruner.compact(), batch(99)) < 1e-5


def test_accumulation_schedulers_and_parameter_groups() -> None:
    torch.manual_seed(0)
    model = Plain().double()
    norms = [p for p in model.parameters() if p.dim() == 1]
    weights = [p for p in model.parameters() if p.dim() > 1]
    optimizer = sparsekern.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    pruner = Pruner(model, optimizer, batch(0, dtype=torch.float64), keep=0.3, steps=STEPS, events=4)
    for step in range(STEPS):
        for part in range(2):
            model(batch(2 * step + part, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert pruner.finished
    assert sparsekern.verify(model, pruner.compact(), batch(99, dtype=torch.float64)) < 1e-12


def test_a_compiled_model() -> None:
    torch.manual_seed(0)
    model = Plain()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = adamw(list(compiled.parameters()))
    pruner = Pruner(compiled, optimizer, batch(0), keep=0.3, steps=STEPS, events=4)
    train(compiled, optimizer, range(STEPS))
    small = pruner.compact()
    assert type(small) is Plain
    assert sparsekern.verify(model, small, batch(99)) < 1e-5


def test_a_frozen_backbone_is_not_pruned() -> None:
    model = Plain()
    model.stem.requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    pruner = Pruner(model, optimizer, batch(0), keep=0.5, steps=10)
    assert not any("stem" in group.name for group in pruner.graph.groups)
    assert any("stem" in name and "not trained" in reason for name, reason in pruner.graph.frozen)


def test_protected_layers_stay_whole() -> None:
    model = Plain()
    pruner = pruned(model, adamw, protect=["body*"], keep=0.6)
    assert pruner.compact().body[0].out_channels == 32


def test_round_to_gives_whole_blocks() -> None:
    small = pruned(Plain(width=32), adamw, round_to=8, keep=0.3).compact()
    assert small.stem[0].out_channels % 8 == 0
    assert small.body[0].out_channels % 8 == 0


def test_floors_by_group() -> None:
    pruner = pruned(Plain(), adamw, min_channels={"stem*": 10, "*": 2}, keep=0.35)
    small = pruner.compact()
    assert small.stem[0].out_channels >= 10


def test_a_duplicate_is_folded_with_almost_no_change_of_the_output() -> None:
    torch.manual_seed(0)
    model = Plain().double()
    with torch.no_grad():
        for copied, source in ((1, 0), (3, 2), (5, 4)):
            model.stem[0].weight[copied] = 2 * model.stem[0].weight[source]
            model.stem[1].weight[copied] = 0.5 * model.stem[1].weight[source]
    model.eval()
    with torch.no_grad():
        for norm in (model.stem[1], model.body[1]):
            norm.running_var.fill_(1)
    model.stem[1].running_var[1::2] *= 1
    before = model(batch(99, dtype=torch.float64))
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(
        model,
        optimizer,
        batch(0, dtype=torch.float64),
        keep=0.85,
        steps=10,
        events=1,
        penalty=0.0,
        protect=["bare*"],
        select=sparsekern.criteria.Redundancy(),
    )
    with torch.no_grad():
        # A filter scaled by 2 has 4 times the variance; this is the value that training would measure.
        model.stem[1].running_var[[1, 3, 5]] = 4
    before = model(batch(99, dtype=torch.float64)).detach()
    train(model, optimizer, range(2), torch.float64)
    assert set(np.flatnonzero(pruner._network.masks.state)) >= {1, 3, 5} - {0}
    model.eval()
    after = model(batch(99, dtype=torch.float64)).detach()
    assert (after - before).abs().max() < 0.05 * before.abs().max()


def test_abort_restores_fading_channels() -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = adamw(list(model.parameters()))
    pruner = Pruner(
        model, optimizer, batch(0), keep=0.3, steps=20, events=1, select=sparsekern.criteria.Taylor()
    )
    train(model, optimizer, range(5))
    fading = pruner.metrics()["condemned"]
    assert fading > 0
    assert pruner.abort() == fading
    train(model, optimizer, range(5, 20))
    assert pruner.metrics()["macs_share"] == 1


def test_another_budget_is_planned_from_the_same_statistics() -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = adamw(list(model.parameters()))
    pruner = Pruner(model, optimizer, batch(0), keep=0.9, steps=100)
    train(model, optimizer, range(5))
    small = sparsekern.compact(model, pruner.plan(keep=0.3))
    kept = sum(p.numel() for p in small.parameters())
    assert kept < sum(p.numel() for p in pruner.compact().parameters())
    with pytest.raises(ValueError, match="keep: got 0.0001 of macs, expected at least"):
        pruner.plan(keep=0.0001)


def test_detach_stops_it() -> None:
    model = Plain()
    optimizer = adamw(list(model.parameters()))
    pruner = Pruner(model, optimizer, batch(0), keep=0.3, steps=STEPS)
    pruner.detach()
    train(model, optimizer, range(STEPS))
    assert pruner.metrics()["step"] == 0
    assert pruner.metrics()["macs_share"] == 1


def test_recalibration_takes_the_mean_over_the_batches() -> None:
    model = Plain().eval()
    batches = [batch(seed) for seed in range(3)]
    assert sparsekern.recalibrate(model, batches) == 3
    features = torch.stack([model.stem[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(model.stem[1].running_mean, features)
    assert not model.training
    assert model.stem[1].momentum == 0.1
    with pytest.raises(ValueError, match="batches: got none"):
        sparsekern.recalibrate(model, [])


def test_metrics_are_flat_numbers_and_widths_are_apart() -> None:
    pruner = pruned(Plain(), adamw)
    metrics, widths = pruner.metrics(), pruner.widths()
    assert all(type(value) in (int, float) for value in metrics.values())
    assert list(widths) == [group.name for group in pruner.graph.groups]
    assert metrics["kept"] == sum(kept for kept, _ in widths.values()) < metrics["channels"]
    convolutions = [m.out_channels for m in pruner.compact().modules() if isinstance(m, nn.Conv2d)]
    assert [kept for kept, _ in widths.values()] == convolutions
    assert [whole for _, whole in widths.values()] == [16, 32, 16]
