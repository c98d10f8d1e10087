"""Fused normalisations in a pruned training: masks, counts of activations' gradients, their state."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from prune.networks import Plain, Residual, batch, train
from torch import nn

import sparsekern
from sparsekern import Pruner, criteria, prune_once
from sparsekern.fusion import fuse
from sparsekern.nn import NormAct2d
from sparsekern.prune.state.statistics import Statistics, gather

STEPS = 24
COUNT = criteria.GradientCount(level="activation")


def fused(network: type[nn.Module] = Plain, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = network().double()
    fuse(model, batch(0, dtype=torch.float64))
    return model


def pruned(model: nn.Module, select: criteria.Criterion | None = COUNT, **options: object) -> Pruner:
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-2)
    example = batch(0, dtype=torch.float64)
    arguments: dict = {"keep": 0.3, "steps": STEPS, "events": 4, "select": select} | options
    return Pruner(model, optimizer, example, **arguments)


def run(model: nn.Module, pruner: Pruner, steps: range) -> None:
    train(model, pruner._network.optimizer, steps, dtype=torch.float64)


def statistics(pruner: Pruner) -> Statistics:
    network = pruner._network
    live = np.ones(pruner.graph.num_channels, bool)
    return gather(network.rows, network.graph, live, network.parameters, network.activations)


@pytest.mark.parametrize("select", [None, COUNT, criteria.Taylor() * COUNT], ids=str)
def test_a_fused_training_masks_in_its_modules_and_ends_compact(select: criteria.Criterion | None) -> None:
    model = fused()
    pruner = pruned(model, select)
    run(model, pruner, range(STEPS))
    assert pruner.finished
    norms = [m for m in model.modules() if isinstance(m, NormAct2d)]
    assert any(bool(m.mask.any()) for m in norms if m.mask is not None)
    for module in norms:
        assert module.mask is not None
        assert torch.equal(module.mask, (module.weight == 0) & (module.bias == 0))
        assert (module.counts is None) == (select is None)
    small = pruner.compact()
    assert sparsekern.verify(model, small, batch(9, dtype=torch.float64)) < 1e-12
    assert all(m.mask is None and m.counts is None for m in small.modules() if isinstance(m, NormAct2d))
    pruner.detach()
    assert all(m.mask is None and m.counts is None for m in norms)


def test_masks_in_modules_change_no_training() -> None:
    """A training with masks in the modules equals one without."""
    models = [fused(), fused()]
    pruners = [pruned(model, criteria.Magnitude()) for model in models]
    for module in models[1].modules():
        if isinstance(module, NormAct2d):
            module.mask = None
    for model, pruner in zip(models, pruners, strict=True):
        run(model, pruner, range(STEPS))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_counts_are_those_of_the_activations_gradients() -> None:
    """Counts equal those of hooks on the gradients of the modules' outputs, with the same running mean."""
    model = fused()
    pruner = pruned(model, warmup=0.9, finish=0.95)
    module = model.stem[1]
    decay = pruner._network.activations.decay
    grads: list[torch.Tensor] = []

    def watch(_: nn.Module, __: object, y: torch.Tensor) -> None:
        y.register_hook(lambda grad: grads.append(torch.where(y > 0, grad, 0).detach()))

    module.register_forward_hook(watch)
    threshold, activity = torch.full((16,), torch.inf, dtype=torch.float64), torch.zeros(16).double()
    for step in range(6):
        norm = (module.weight.square() + module.bias.square()).sqrt().detach()
        run(model, pruner, range(step, step + 1))
        dz = grads[-1]
        share = (dz.abs() > threshold[:, None, None]).double().mean((0, 2, 3))
        activity = activity * decay + share * (1 - decay)
        rms = (dz.square().mean((0, 2, 3)) * norm.square()).mean().sqrt()
        # The module keeps float32.
        threshold = (rms / norm).float().double()
    counted = statistics(pruner).activation_counts
    assert counted is not None
    channels = pruner.graph.tensors["stem.1.weight"].channels[0]
    torch.testing.assert_close(
        torch.from_numpy(counted[channels]), activity / (1 - decay**6), rtol=1e-5, atol=0
    )
    assert activity.max() > 0


def test_channels_without_a_norm_count_by_their_weights_and_several_norms_by_their_mean() -> None:
    model = fused()
    pruner = pruned(model, warmup=0.9, finish=0.95)
    run(model, pruner, range(5))
    found = statistics(pruner)
    bare = pruner.graph.tensors["bare.weight"].channels[0]
    assert found.activation_counts is not None
    np.testing.assert_array_equal(found.activation_counts[bare], found.activity[bare])
    model = fused(Residual)
    pruner = pruned(model, warmup=0.9, finish=0.95)
    run(model, pruner, range(5))
    found = statistics(pruner)
    network = pruner._network
    unbias = 1 - network.activations.decay**5
    parts = [model.stem[1], model.left[1], model.back[1]]
    mean = sum(part.counts.activity.double() for part in parts) / 3 / unbias
    channels = pruner.graph.tensors["stem.1.weight"].channels[0]
    assert found.activation_counts is not None
    np.testing.assert_allclose(found.activation_counts[channels], mean.numpy(), rtol=1e-12)


def test_counts_and_plan_do_not_depend_on_how_channels_are_scaled() -> None:
    """Gamma and beta are multiplied by a power of two and their readers' columns divided by it.

    The function stays the same, so counts and plan do."""
    scale = 2.0 ** torch.randint(-4, 5, (16,), generator=torch.Generator().manual_seed(1)).double()
    results = []
    for rescaled in (False, True):
        model = fused()
        with torch.no_grad():
            if rescaled:
                model.stem[1].weight.mul_(scale)
                model.stem[1].bias.mul_(scale)
                model.body[0].weight.div_(scale[None, :, None, None])
            # The next normalisation divides by the deviation, and its epsilon depends on the scale.
            model.body[1].eps = 1e-30
        optimizer = sparsekern.optim.SGD(model.parameters(), lr=1e-300)
        example = batch(0, dtype=torch.float64)
        pruner = Pruner(model, optimizer, example, keep=0.4, steps=100, warmup=0.5, finish=0.9, select=COUNT)
        train(model, optimizer, range(8), dtype=torch.float64)
        results.append((statistics(pruner).activation_counts, pruner.plan(keep=0.4)))
    channels = pruner.graph.tensors["stem.1.weight"].channels[0]
    assert results[0][0] is not None and results[0][0][channels].max() > 0
    np.testing.assert_array_equal(results[0][0][channels], results[1][0][channels])
    assert results[0][1].tensors["stem.0.weight"] == results[1][1].tensors["stem.0.weight"]


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("stop", [3, 8, 13])
def test_resumed_bit_by_bit(stop: int, shrink: bool) -> None:
    options = {"shrink": shrink, "round_to": 1}
    model = fused()
    pruner = pruned(model, **options)
    run(model, pruner, range(stop))
    states = copy.deepcopy([model.state_dict(), pruner._network.optimizer.state_dict(), pruner.state_dict()])
    run(model, pruner, range(stop, STEPS))
    resumed = fused(seed=1)
    its_pruner = pruned(resumed, **options)
    its_pruner.load_state_dict(states[2])
    resumed.load_state_dict(states[0])
    its_pruner._network.optimizer.load_state_dict(states[1])
    run(resumed, its_pruner, range(stop, STEPS))
    for (name, mine), other in zip(resumed.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name
    for name, mine in its_pruner.state_dict()["activations"].items():
        assert torch.equal(mine, pruner.state_dict()["activations"][name]), name


def test_shrunk_decides_as_masked() -> None:
    models = [fused(), fused()]
    pruners = [
        pruned(model, shrink=shrink, round_to=1) for model, shrink in zip(models, (False, True), strict=True)
    ]
    for model, pruner in zip(models, pruners, strict=True):
        run(model, pruner, range(STEPS))
    assert pruners[1].plan() == pruners[0].plan()
    assert sparsekern.verify(pruners[0].compact(), models[1], batch(9, dtype=torch.float64)) < 1e-9


def test_prune_once_by_activations() -> None:
    model = fused()
    data = [(batch(n, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)) for n in range(3)]
    example, loss = batch(0, dtype=torch.float64), nn.MSELoss()
    result = prune_once(model, example, keep=0.5, select=COUNT, calibration=data, loss=loss)
    by_weights = prune_once(
        model, example, keep=0.5, select=criteria.GradientCount(), calibration=data, loss=loss
    )
    assert result.plan != by_weights.plan
    assert all(m.counts is None for m in model.modules() if isinstance(m, NormAct2d))
    assert result.network(example).shape == (4, 4)


def test_activations_of_a_network_without_fused_norms_are_refused() -> None:
    torch.manual_seed(0)
    model = Plain().double()
    with pytest.raises(ValueError, match=r"select: got .* without a NormAct2d .* sparsekern.fusion.fuse"):
        pruned(model)
    data, loss = [(batch(0, dtype=torch.float64), torch.zeros(4, 4).double())], nn.MSELoss()
    with pytest.raises(ValueError, match="sparsekern.fusion.fuse"):
        prune_once(model, batch(0, dtype=torch.float64), keep=0.5, select=COUNT, calibration=data, loss=loss)
    with pytest.raises(ValueError, match="level: got 'layer', expected 'weight' or 'activation'"):
        criteria.GradientCount(level="layer")
    counted = pruned(fused())
    state = counted.state_dict()
    short = {name: values[:-1] for name, values in state["activations"].items()}
    for wrong in (state | {"activations": short}, state | {"activations": None}):
        with pytest.raises(ValueError, match=r"state\['activations'\](\['threshold'\])?: got .*, expected"):
            counted.load_state_dict(wrong)
    # Without a criterion that uses counts they are not in the state, so fused and unfused models are alike.
    pruned(fused(), None).load_state_dict(pruned(model, None).state_dict())


def test_combined_criteria_pass_on_what_they_need() -> None:
    weight = criteria.GradientCount()
    assert not criteria.default().needs_activations and not (weight * 2).needs_activations
    for criterion in (COUNT + weight, 2 * COUNT, criteria.Shuffled(of=COUNT), criteria.Redundancy(of=COUNT)):
        assert criterion.needs_activations


def norms(model: nn.Module) -> list[NormAct2d]:
    return [module for module in model.modules() if isinstance(module, NormAct2d)]


def test_going_back_to_an_earlier_state_counts_again() -> None:
    model = fused()
    pruner = pruned(model)
    run(model, pruner, range(2))
    every = (pruner, model, pruner._network.optimizer)
    saved = copy.deepcopy([part.state_dict() for part in every])
    run(model, pruner, range(2, STEPS))
    ended = copy.deepcopy(model.state_dict())
    for part, state in zip(every, saved, strict=True):
        part.load_state_dict(state)
    assert not any(m.mask.any() for m in norms(model) if m.mask is not None)
    run(model, pruner, range(2, STEPS))
    assert all(torch.equal(value, ended[name]) for name, value in model.state_dict().items())


def test_taken_apart_while_it_is_pruned() -> None:
    torch.manual_seed(0)
    model = Plain().double()
    fusion = fuse(model, batch(0, dtype=torch.float64))
    pruner = pruned(model, shrink=True, round_to=1)
    run(model, pruner, range(10))
    fusion.undo()
    run(model, pruner, range(10, STEPS))
    assert pruner.finished and not norms(model)
    assert not any("mask" in vars(m) or "counts" in vars(m) for m in model.modules())


def test_a_copy_counts_and_skips_nothing() -> None:
    model = fused()
    pruner = pruned(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    run(model, pruner, range(STEPS))
    assert all(m.mask is None and m.counts is None for m in norms(averaged))


def test_a_forecast_counts_on_copies() -> None:
    model = fused()
    pruner = pruned(model, shrink=True, round_to=1)
    stages = pruner.forecast(measure=batch(1, dtype=torch.float64)).stages
    assert stages[-1].macs < 0.35 * stages[0].macs
    assert all(m.counts.updates == 0 for m in norms(model) if m.counts is not None)


def test_norms_whose_gates_stay_are_not_masked() -> None:
    """A norm without prunable gates gets no mask, because a mask means that gamma and beta are zero."""
    torch.manual_seed(0)
    first, second = NormAct2d(8, affine=False), NormAct2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), first, nn.Conv2d(8, 8, 3), second, nn.Conv2d(8, 2, 1)).double()
    pruner = pruned(model, keep=0.7)
    assert first.mask is None and first.counts is None and second.counts is not None
    run(model, pruner, range(STEPS))
    assert sparsekern.verify(model, pruner.compact(), batch(99, dtype=torch.float64)) < 1e-12
