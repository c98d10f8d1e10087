"""Weights written after their channels were masked are zeroed again, or raise an error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import Plain, batch, train
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import sparsekern
from sparsekern import Pruner
from sparsekern.prune.state.masking import FADING, MASKED

STEPS = 20
DOUBLE = torch.float64
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sparsekern.AdamW": lambda params: sparsekern.optim.AdamW(params, lr=1e-3),
    "torch.SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
}
Parts = tuple[nn.Module, torch.optim.Optimizer, Pruner]


def parts(steps: int = STEPS, make: str = "sparsekern.AdamW", **options: Any) -> Parts:
    """A model, optimizer and Pruner after ``steps`` of 20 steps; the budget is met after 12."""
    torch.manual_seed(0)
    model = Plain(8).double()
    optimizer = OPTIMIZERS[make](model.parameters())
    defaults: dict = {"keep": 0.3, "steps": STEPS, "events": 3}
    pruner = Pruner(model, optimizer, batch(0, dtype=DOUBLE), **(defaults | options))
    train(model, optimizer, range(steps), DOUBLE)
    return model, optimizer, pruner


def dense() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return Plain(8).double().state_dict()


def assert_exact(model: nn.Module, pruner: Pruner) -> None:
    assert not revived(model, pruner)
    assert sparsekern.verify(model, pruner.compact(), batch(99, dtype=DOUBLE)) < 1e-12


def revived(model: nn.Module, pruner: Pruner) -> int:
    """The number of masked rows that are not zero, counted independently of the package."""
    parameters = dict(model.named_parameters())
    count = 0
    for name, slots in pruner.graph.tensors.items():
        if slots.kind == "parameter" and slots.row_dim is not None:
            channels = slots.channels[slots.row_dim]
            if channels is None:
                continue
            for row in np.flatnonzero((channels >= 0) & (pruner._network.masks.state[channels] == MASKED)):
                count += bool((parameters[name].select(slots.row_dim, int(row)) != 0).any())
    return count


LOADS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "model": lambda model, _: model.load_state_dict(dense()),
    "part": lambda model, _: model.body.load_state_dict(
        {name[5:]: value for name, value in dense().items() if name.startswith("body.")}
    ),
    "layer": lambda model, _: model.bare.load_state_dict(
        {name[5:]: value for name, value in dense().items() if name.startswith("bare.")}
    ),
    "compiled": lambda model, _: torch.compile(model).load_state_dict(
        {f"_orig_mod.{name}": value for name, value in dense().items()}
    ),
    "inside another": lambda model, _: nn.ModuleDict({"net": model}).load_state_dict(
        {f"net.{name}": value for name, value in dense().items()}
    ),
    "not strict": lambda model, _: model.load_state_dict({**dense(), "more": torch.ones(1)}, strict=False),
    "swapped": lambda model, _: _swapping(model),
}


def _swapping(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(dense())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_a_load_leaves_masked_rows_zero(load: Callable[..., Any]) -> None:
    model, optimizer, pruner = parts()
    load(model, optimizer)
    assert_exact(model, pruner)
    assert pruner.remask() == 0
    train(model, optimizer, range(2), DOUBLE)
    assert_exact(model, pruner)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_state_of_a_dense_training_revives_nothing(make: str) -> None:
    model, optimizer, pruner = parts(make=make)
    _, other, _ = parts(1, make)
    optimizer.load_state_dict(other.state_dict())
    slots = pruner.graph.tensors["body.0.weight"]
    gone = np.flatnonzero(pruner._network.masks.state[slots.channels[0]] == MASKED)
    for value in optimizer.state[model.body[0].weight].values():
        if value.ndim:
            assert value.any() and not value[torch.from_numpy(gone)].any()
    train(model, optimizer, range(3), DOUBLE)
    assert_exact(model, pruner)


def test_a_load_that_fails_halfway_leaves_masked_rows_zero() -> None:
    model, _, pruner = parts()
    wrong = {**dense(), "head.weight": torch.ones(1, 1)}
    with pytest.raises(RuntimeError, match="size mismatch for head.weight"):
        model.load_state_dict(wrong)
    assert_exact(model, pruner)


def test_a_shrunk_model_refuses_weights_of_full_size_as_torch_does() -> None:
    model, _, pruner = parts(shrink=True, round_to=1)
    with pytest.raises(RuntimeError, match="size mismatch for stem.0.weight"):
        model.load_state_dict(dense())
    own = {name: torch.randn_like(value) for name, value in model.state_dict().items() if value.ndim}
    model.load_state_dict(own, strict=False)
    assert_exact(model.eval(), pruner)


@pytest.mark.parametrize("shrink", [False, True])
def test_loads_between_events_leave_masked_rows_zero_too(shrink: bool) -> None:
    model, optimizer, pruner = parts(0, shrink=shrink, round_to=1)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1), DOUBLE)
        model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
        assert not revived(model, pruner)
    assert pruner.finished
    assert_exact(model, pruner)


def _slow_weights(model: nn.Module) -> None:
    """Copy back an average of earlier weights, as some optimizer wrappers do."""
    slow = dense()
    for name, param in model.named_parameters():
        param.data.lerp_(slow[name], 0.5)


def _new_storage(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        param.data = dense()[name]


def _averaged(model: nn.Module) -> None:
    average = AveragedModel(Plain(8).double())
    for own, other in zip(model.parameters(), average.module.parameters(), strict=True):
        with torch.no_grad():
            own.copy_(other)


def _initialised(model: nn.Module) -> None:
    nn.init.kaiming_normal_(model.stem[0].weight)


def _poisoned(model: nn.Module) -> None:
    model.stem[1].weight.data.fill_(torch.nan)


WRITES = [_slow_weights, _new_storage, _averaged, _initialised, _poisoned]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_an_error_until_remask(write: Callable[[nn.Module], None], tmp_path: Any) -> None:
    model, _, pruner = parts()
    write(model)
    count = revived(model, pruner)
    assert count
    message = rf"masked rows: got {count} that are not zero, of .*remask\(\)"
    path = tmp_path / "checkpoint.pt"
    for act in (pruner.compact, pruner.plan, pruner.shrink, lambda: pruner.save_checkpoint(path)):
        with pytest.raises(RuntimeError, match=message):
            act()
    assert not path.exists()
    assert pruner.remask() == count
    assert pruner.remask() == 0
    if write is not _poisoned:
        assert_exact(model, pruner)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_next_event_looks_and_goes_on_after_remask(make: str) -> None:
    model, optimizer, pruner = parts(9, make)
    last = max(event.step for event in pruner._events.schedule.events)
    assert (pruner._network.masks.state == MASKED).any() and last > 9 - 4
    _slow_weights(model)
    before = pruner._network.masks.state.copy()
    if make == "torch.SGD":  # its hooks zero masked rows after every step, so there is nothing to detect
        train(model, optimizer, range(9, STEPS), DOUBLE)
        return assert_exact(model, pruner)
    with pytest.raises(RuntimeError, match="masked rows"):
        train(model, optimizer, range(9, STEPS), DOUBLE)
    assert (pruner._network.masks.state == before).all()
    with pytest.raises(RuntimeError, match="masked rows"):
        optimizer.step()
    assert pruner.remask()
    train(model, optimizer, range(STEPS), DOUBLE)
    assert pruner.finished
    assert_exact(model, pruner)


def test_fading_channels_take_what_is_loaded_and_still_go() -> None:
    model, optimizer, pruner = parts(3)
    fading = pruner._network.masks.state == FADING
    assert fading.any()
    model.load_state_dict(dense())
    train(model, optimizer, range(3, STEPS), DOUBLE)
    assert (pruner._network.masks.state[fading] == MASKED).all()
    assert_exact(model, pruner)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["column", "statistic"])
def test_what_is_not_finite_beside_masked_rows_counts(where: str, value: float) -> None:
    model, _, pruner = parts()
    gone = int(
        np.flatnonzero(pruner._network.masks.state[pruner.graph.tensors["stem.1.weight"].channels[0]])[0]
    )
    place = model.body[0].weight.data[:, gone] if where == "column" else model.stem[1].running_mean[gone]
    place.fill_(7)
    assert_exact(model, pruner)  # a finite number there is multiplied by zero
    place.fill_(value)
    with pytest.raises(RuntimeError, match=r"masked rows: got 1 .*stem"):
        pruner.compact()
    assert pruner.remask() == 1
    assert_exact(model, pruner)


def test_running_statistics_may_change() -> None:
    model, _, pruner = parts()
    update_bn([batch(seed, dtype=DOUBLE) for seed in range(3)], model)
    assert_exact(model, pruner)


def test_another_dtype_keeps_the_masks() -> None:
    model, _, pruner = parts()
    model.float()
    assert sparsekern.verify(model, pruner.compact(), batch(99)) < 1e-5
    model.double()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert_exact(model, pruner)


def _replace(model: nn.Module) -> None:
    model.body[0].weight = nn.Parameter(model.body[0].weight.detach().clone())


def _exchange_layer(model: nn.Module) -> None:
    model.bare = copy.deepcopy(model.bare)


def _parametrise(model: nn.Module) -> None:
    parametrize.register_parametrization(model.body[0], "weight", nn.Identity())


def _weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.bare)


def _other_shape(model: nn.Module) -> None:
    model.bare.weight.data = torch.ones(3, 16, 3, 3, dtype=DOUBLE)


@pytest.mark.parametrize("change", [_replace, _exchange_layer, _parametrise, _weight_norm, _other_shape])
def test_parameters_that_are_no_longer_the_optimizers_are_named(change: Callable[[nn.Module], None]) -> None:
    model, _, pruner = parts()
    change(model)
    for act in (pruner.compact, pruner.plan, pruner.shrink):
        with pytest.raises(RuntimeError, match=r"model: got .*'(body.0|bare).weight'"):
            act()


@pytest.mark.parametrize("of", ["model", "part"])
def test_assigning_loads_are_refused_before_anything_changes(of: str) -> None:
    model, _, pruner = parts()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    module = model if of == "model" else model.body
    state = {name: value + 1 for name, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"load_state_dict: got assign=True .*pruner.detach\(\)"):
        module.load_state_dict(state, assign=True)
    for name, tensor in model.named_parameters():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])
    pruner.detach()
    module.load_state_dict(state, assign=True)


def test_copies_pickles_and_compact_models_load_what_they_are_given() -> None:
    model, _, pruner = parts()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(dense(), assign=True)
        assert all(torch.equal(value, dense()[name]) for name, value in other.state_dict().items())
    for module in pruner.compact().modules():
        assert not module._load_state_dict_pre_hooks and not module._load_state_dict_post_hooks
    pruner.detach()
    for module in model.modules():
        assert not module._load_state_dict_pre_hooks and not module._load_state_dict_post_hooks
    model.load_state_dict(dense())
    assert all(torch.equal(value, dense()[name]) for name, value in model.state_dict().items())


def test_a_step_in_the_backward_pass_leaves_them_zero() -> None:
    model, optimizer, pruner = parts(0)
    sparsekern.optim.in_backward(optimizer)
    train(model, optimizer, range(10), DOUBLE)
    model.load_state_dict(dense())
    train(model, optimizer, range(10, STEPS), DOUBLE)
    assert pruner.finished
    assert_exact(model, pruner)


def test_averages_given_to_the_pruner_are_masked_with_the_model() -> None:
    torch.manual_seed(0)
    model = Plain(8).double()
    optimizer = OPTIMIZERS["sparsekern.AdamW"](model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    pruner = Pruner(model, optimizer, batch(0, dtype=DOUBLE), keep=0.3, steps=STEPS, events=3, also=[average])
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1), DOUBLE)
        average.update_parameters(model)
    small = sparsekern.compact(average.module, pruner.plan())
    assert sparsekern.verify(average.module, small, batch(99, dtype=DOUBLE)) < 1e-12
    assert not torch.equal(average.module.head.bias, model.head.bias)
    average.module.load_state_dict(dense())
    with pytest.raises(RuntimeError, match="masked rows"):
        pruner.plan()
    assert pruner.remask()
    small = sparsekern.compact(average.module, pruner.plan())
    assert sparsekern.verify(average.module, small, batch(99, dtype=DOUBLE)) < 1e-12
