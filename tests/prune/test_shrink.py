"""Shrinking in mid-training: the loss stays the same, and everything that stores a size is updated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import Plain, Residual, batch, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern
from sparsekern import Pruner
from sparsekern.compact import plan_of
from sparsekern.prune.state.masking import MASKED
from sparsekern.prune.state.network import CUT

STEPS = 40

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sparsekern.SGD": lambda params: sparsekern.optim.SGD(params, lr=0.05, momentum=0.9),
    "sparsekern.Adam": lambda params: sparsekern.optim.Adam(params, lr=1e-3, amsgrad=True),
    "sparsekern.AdamW": lambda params: sparsekern.optim.AdamW(params, lr=1e-3),
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "torch.AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "torch.RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
    "torch.NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
}
DOUBLE = torch.float64


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Trains in float64 and returns the loss of every step."""
    values = []
    for step in steps:
        loss = model(batch(step, dtype=DOUBLE)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def parts(
    network: type[nn.Module] = Plain,
    make: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["sparsekern.AdamW"],
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    torch.manual_seed(0)
    model = network().double()
    optimizer = make(model.parameters())
    defaults: dict = {"keep": 0.3, "steps": STEPS, "events": 4, "round_to": 2}
    return model, optimizer, Pruner(model, optimizer, batch(0, dtype=DOUBLE), **(defaults | options))


@pytest.mark.parametrize("network", [Plain, Residual])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_training_with_shrink_is_the_masked_one_to_rounding(
    network: type[nn.Module], make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    runs = []
    for shrink in (False, True):
        model, optimizer, pruner = parts(network, make, shrink=shrink, steps=60)
        runs.append((losses(model, optimizer, range(80)), pruner.metrics(), model, pruner.plan()))
    (masked, metrics, big, plan), (shrunk, its_metrics, small, its_plan) = runs
    np.testing.assert_allclose(shrunk, masked, rtol=1e-10)
    assert its_metrics == metrics
    assert metrics["macs_share"] <= 0.3
    assert its_plan == plan == plan_of(small)
    assert sum(p.numel() for p in small.parameters()) == metrics["params"]
    assert sparsekern.verify(big, small, batch(99, dtype=DOUBLE)) < 1e-10


@pytest.mark.parametrize(
    "select",
    [
        sparsekern.criteria.GradientCount(),
        sparsekern.criteria.GradientCount(relative=False),
        sparsekern.criteria.Redundancy(),
        sparsekern.criteria.Taylor() + 0.1 * sparsekern.criteria.Magnitude(),
        sparsekern.criteria.Shuffled(sparsekern.criteria.GradientCount()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", ["sparsekern.AdamW", "torch.RMSprop"])
def test_every_decision_with_shrink_is_that_of_the_masked_training(
    make: str, select: sparsekern.criteria.Criterion
) -> None:
    masked, shrunk = (
        parts(Residual, OPTIMIZERS[make], shrink=shrink, select=select, events=5) for shrink in (False, True)
    )
    for step in range(STEPS):
        for model, optimizer, _ in (masked, shrunk):
            losses(model, optimizer, range(step, step + 1))
        states = [pruner.state_dict() for _, _, pruner in (masked, shrunk)]
        # A removed channel was masked before.
        channels = [state["channels"].clamp(max=MASKED) for state in states]
        assert torch.equal(*channels), step
        rows = states[0]["rows"]["activity"][_rows_left(*states)]
        np.testing.assert_allclose(rows, states[1]["rows"]["activity"], rtol=1e-5)
    assert (channels[0] == MASKED).any() and (states[1]["channels"] == CUT).any()


def _rows_left(masked: dict[str, Any], shrunk: dict[str, Any]) -> Tensor:
    """bool ``[R]``: the rows of the masked network that the shrunk one has."""
    return masked["rows"]["countdown"] != 0


def test_two_hundred_steps_after_a_shrink_by_hand() -> None:
    runs = []
    for shrink in (False, True):
        model, optimizer, pruner = parts()
        before = losses(model, optimizer, range(STEPS))
        assert pruner.finished
        if shrink:
            assert pruner.shrink()
            assert not pruner.shrink()
        runs.append((before, losses(model, optimizer, range(STEPS, STEPS + 200))))
    (before, masked), (its_before, shrunk) = runs
    assert before == its_before
    assert abs(shrunk[0] / masked[0] - 1) <= 1e-12
    np.testing.assert_allclose(shrunk, masked, rtol=1e-9)


def test_shrinking_by_hand_after_any_step_changes_no_loss() -> None:
    runs = []
    for shrink in (False, True):
        model, optimizer, pruner = parts(select=sparsekern.criteria.Taylor(), events=5)
        values, cuts = [], 0
        for step in range(STEPS + 10):
            values += losses(model, optimizer, range(step, step + 1))
            cuts += shrink and pruner.shrink()
        runs.append((values, pruner.metrics()))
    assert cuts >= 4
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-10)
    assert runs[0][1] == runs[1][1]


SLICED = OPTIMIZERS | {"torch.Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3)}


@pytest.mark.parametrize("make", SLICED.values(), ids=SLICED.keys())
def test_rows_statistics_and_optimizer_state_are_exactly_the_kept_slices(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    model, optimizer, pruner = parts(Residual, make)
    losses(model, optimizer, range(STEPS))
    kept, rows = pruner._network.masks.unmasked, pruner._network.rows
    row_kept = np.append(kept, True)[rows.channel_of]
    table = {name: v.clone() for name, v in rows.table.state_dict().items() if isinstance(v, Tensor)}
    names = {id(p): name for name, p in model.named_parameters()}
    before = {names[id(p)]: copy.deepcopy(dict(entry)) for p, entry in optimizer.state.items()}
    groups, identities = optimizer.param_groups, [id(p) for p in model.parameters()]
    assert pruner.shrink()
    for name in ("penalty", "countdown", "sums", "threshold", "activity"):
        assert torch.equal(getattr(pruner._network.rows.table, name), table[name][torch.from_numpy(row_kept)])
    for name in ("channel_dot", "channel_dot_sq"):
        assert torch.equal(getattr(pruner._network.rows.table, name), table[name][torch.from_numpy(kept)])
    assert torch.equal(pruner._network.rows.table.updates, table["updates"])
    assert (pruner._network.rows.is_gate == rows.is_gate[row_kept]).all()
    assert (pruner._network.rows.is_producer == rows.is_producer[row_kept]).all()
    assert optimizer.param_groups is groups
    assert [id(p) for p in model.parameters()] == identities
    plan = pruner.plan()
    for param, entry in optimizer.state.items():
        part = plan.tensors.get(names[id(param)])
        for key, value in entry.items():
            old = before[names[id(param)]][key]
            if isinstance(value, Tensor) and value.dim() and part is not None:
                for dim, indices in part.keep.items():
                    if old.shape[dim] != 1:
                        old = old.index_select(dim, torch.from_numpy(indices.copy()))
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(old)), key


def test_budgets_floors_and_balance_are_those_of_the_whole_network() -> None:
    for allocate in (
        sparsekern.allocate.Global(),
        sparsekern.allocate.Uniform(),
        sparsekern.allocate.Flat(),
    ):
        kept = []
        for shrink in (False, True):
            model, optimizer, pruner = parts(
                shrink=shrink, allocate=allocate, select=sparsekern.criteria.Random(3), min_channels=3
            )
            losses(model, optimizer, range(STEPS))
            kept.append((pruner.plan(), pruner.metrics(), pruner.widths()))
        assert kept[0] == kept[1]


def test_everything_about_the_pruner_goes_on_working(tmp_path: Path) -> None:
    model, optimizer, pruner = parts(shrink=True)
    at_event = pruner._events.schedule.events[1].step
    losses(model, optimizer, range(at_event + 1))
    metrics = pruner.metrics()
    kept, channels = zip(*pruner.widths().values(), strict=True)
    assert channels == (16, 32, 16) and metrics["channels"] == 64
    assert [len(group.channels) for group in pruner.graph.groups] == list(kept) != list(channels)
    assert sum(kept) == metrics["kept"]
    assert metrics["condemned"] > 0
    assert "channels in 3 groups" in str(pruner.graph)
    assert pruner.abort() == metrics["condemned"]
    planned = pruner.plan(keep=0.2)
    small = sparsekern.compact(model, planned)
    assert plan_of(small) == planned
    assert pruner.graph.cost(np.ones(pruner.graph.num_channels, bool)).params == metrics["params"]
    losses(model, optimizer, range(at_event + 1, STEPS))
    assert pruner.finished
    small = pruner.compact()
    assert sparsekern.verify(model, small, batch(99, dtype=DOUBLE)) == 0
    sparsekern.save(small, tmp_path / "small.safetensors")
    sparsekern.save(model, tmp_path / "model.safetensors")
    for name in ("small", "model"):
        loaded = sparsekern.load(Plain().double(), tmp_path / f"{name}.safetensors")
        assert sparsekern.verify(model, loaded, batch(99, dtype=DOUBLE)) == 0
    fresh = sparsekern.compact(Plain().double(), pruner.plan())
    fresh.load_state_dict(model.state_dict())
    assert sparsekern.verify(model, fresh, batch(99, dtype=DOUBLE)) == 0


def test_copies_shrink_with_the_model_at_events_and_by_hand() -> None:
    torch.manual_seed(0)
    model = Plain().double()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    other = AveragedModel(model)
    pruner = Pruner(
        model,
        optimizer,
        batch(0, dtype=DOUBLE),
        keep=0.3,
        steps=STEPS,
        events=4,
        round_to=2,
        shrink=True,
        also=[average],
    )
    for step in range(STEPS):
        losses(model, optimizer, range(step, step + 1))
        average.update_parameters(model)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert average(batch(0, dtype=DOUBLE)).isfinite().all()
    assert plan_of(average.module) == pruner.plan()

    model, optimizer, pruner = parts()
    losses(model, optimizer, range(STEPS))
    pruner.shrink(also=[other])
    other.update_parameters(model)
    assert sparsekern.verify(other.module, model, batch(99, dtype=DOUBLE)) < 1e-12


def test_a_compiled_model_recompiles_once_per_event() -> None:
    torch.manual_seed(0)
    model = Plain()
    compiles = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiles.append(step)
        return graph

    compiled = torch.compile(model, backend=backend)
    optimizer = sparsekern.optim.AdamW(compiled.parameters(), lr=1e-3)
    pruner = Pruner(compiled, optimizer, batch(0), keep=0.3, steps=60, events=12, round_to=1, shrink=True)
    sizes = []
    for step in range(60):
        train(compiled, optimizer, range(step, step + 1))
        sizes.append(sum(p.numel() for p in model.parameters()))
    changed = [0] + [n + 1 for n in range(59) if sizes[n + 1] != sizes[n]]
    # A change after step n is seen by the next one.
    assert compiles == [0] + [n + 1 for n in changed[1:]]
    assert len(compiles) > torch._dynamo.config.recompile_limit
    assert pruner.finished


def test_a_compiled_optimizer_step_follows() -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, optimizer, batch(0), keep=0.4, steps=12, events=2, round_to=2)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(24):
        model(batch(number)).square().mean().backward()
        step()
        optimizer.zero_grad()
        if number in (12, 13):
            pruner.shrink()
    assert pruner.metrics()["macs_share"] <= 0.4
    assert sum(p.numel() for p in model.parameters()) == pruner.metrics()["params"]


def test_schedulers_scalers_and_clipping_see_nothing_of_it() -> None:
    runs = []
    for shrink in (False, True):
        model, optimizer, pruner = parts(shrink=shrink, select=sparsekern.criteria.Taylor())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=7)
        norms = []
        for step in range(STEPS + 8):
            loss = model(batch(step, dtype=DOUBLE)).square().mean()
            scaler.scale(loss * float("inf") if step in (9, 21) else loss).backward()
            scaler.unscale_(optimizer)
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        runs.append((norms, scheduler.state_dict(), scaler.state_dict(), pruner.metrics()))
    (norms, *rest), (its_norms, *its_rest) = runs
    np.testing.assert_allclose(its_norms, norms, rtol=1e-9)
    assert rest == its_rest


class Strange(torch.optim.SGD):
    """Keeps state whose shape does not show how to cut it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["odd"] = torch.zeros(3, 3, 3)
        return super().step(closure)


def test_unknown_state_stops_it_before_anything_changes() -> None:
    model, optimizer, pruner = parts(make=lambda params: Strange(params, lr=0.05))
    losses(model, optimizer, range(STEPS))
    before, metrics = copy.deepcopy(model.state_dict()), pruner.metrics()
    with pytest.raises(
        ValueError, match=r"^optimizer: got a Strange whose state 'odd' of parameter 'stem.0.weight'"
    ):
        pruner.shrink()
    assert pruner.metrics() == metrics
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    losses(model, optimizer, range(3))
    with pytest.raises(ValueError, match=r"^also\[0\]: got a Linear without"):
        pruner.shrink(also=[nn.Linear(1, 1)])


def test_a_state_cutter_makes_it_possible() -> None:
    model, optimizer, pruner = parts(
        make=lambda params: Strange(params, lr=0.05), state_cutter=lambda p, name, value, plan: value[:1]
    )
    losses(model, optimizer, range(STEPS))
    assert pruner.shrink()
    assert optimizer.state[model.stem[0].weight]["odd"].shape == (1, 3, 3)


def test_what_is_no_copy_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^also\[0\]: got a Linear without"):
        parts(also=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"^also\[0\]: got a module of other sizes, .*has shape"):
        parts(also=[Plain(width=8)])


def test_round_to_auto_is_the_default_with_shrink() -> None:
    assert parts(round_to=None, shrink=True, keep=0.6)[2]._settings.policy.round_to == 16
    assert parts(round_to=None)[2]._settings.policy.round_to == 1


def test_hooks_go_on_being_called_with_the_smaller_tensors() -> None:
    model, optimizer, _ = parts(shrink=True)
    seen: list[tuple[int, ...]] = []
    model.stem[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    losses(model, optimizer, range(STEPS + 1))
    assert seen[0] == (16, 3, 3, 3)
    assert seen[-1] == tuple(model.stem[0].weight.shape) != seen[0]


def test_a_step_in_the_backward_pass_shrinks_to_the_same_network() -> None:
    runs = []
    for inside in (False, True):
        model, optimizer, pruner = parts(shrink=True)
        if inside:
            sparsekern.optim.in_backward(optimizer)
        losses(model, optimizer, range(STEPS))
        model(batch(0, dtype=DOUBLE)).square().mean().backward()
        pruner.shrink()
        optimizer.step()
        runs.append((model.state_dict(), pruner.plan()))
    (stepped, plan), (other, its_plan) = runs
    assert plan == its_plan
    assert all(torch.equal(value, other[name]) for name, value in stepped.items())
