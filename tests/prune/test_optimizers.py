"""Pruners with wrapped optimizers, several Pruners with one optimizer, and optimizers with unusual state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim.test_unwrap import Forwards, InLists, Lookahead
from prune.networks import Plain, batch
from torch import nn

import sparsekern
from sparsekern import Pruner

DTYPE = torch.float64
STEPS = 20


def make(model: nn.Module, optimizer: Any, **changes: Any) -> Pruner:
    options: dict[str, Any] = {"keep": 0.4, "steps": STEPS, "events": 3, "round_to": 1} | changes
    return Pruner(model, optimizer, batch(0, dtype=DTYPE), **options)


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().to(DTYPE)


def steps(model: nn.Module, optimizer: Any, count: int = STEPS) -> None:
    for step in range(count):
        model(batch(step, dtype=DTYPE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def gone(pruner: Pruner) -> float:
    """The largest absolute value in masked rows of trained parameters."""
    largest = 0.0
    for view in pruner._network.rows.table.views:
        rows = view.param.detach().movedim(view.dim, 0)[pruner._network.rows.table.countdown[view.slice] == 0]
        largest = max(largest, float(rows.abs().max()) if rows.numel() else 0.0)
    return largest


@pytest.mark.parametrize("inner", [sparsekern.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("shrink", [False, True])
def test_slow_weights_of_a_wrapper_revive_nothing(inner: Any, shrink: bool) -> None:
    model = plain()
    optimizer = Forwards(Lookahead(inner(model.parameters(), lr=0.05, momentum=0.9)))
    optimizer.zero_grad = optimizer.anything.zero_grad  # type: ignore[attr-defined]
    pruner = make(model, optimizer, shrink=shrink)
    steps(model, optimizer)
    assert pruner.finished
    assert gone(pruner) == 0
    small, x = pruner.compact(), batch(9, dtype=DTYPE)
    assert sparsekern.verify(model.eval(), small.eval(), x) < 1e-12
    assert all(state["slow"].shape == param.shape for param, state in optimizer.anything.state.items())


def test_slow_weights_that_nobody_can_mask_are_refused() -> None:
    model = plain()
    optimizer = InLists(torch.optim.SGD(model.parameters(), lr=0.05))
    with pytest.raises(TypeError, match=r"^optimizer: got a InLists that keeps \d+ tensors"):
        make(model, optimizer)
    assert not optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("bad", [None, torch.optim.SGD, plain, "adam"])
def test_what_is_no_optimizer_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="^optimizer: got .*, expected a torch.optim.Optimizer"):
        make(plain(), bad)


def lbfgs(params: Any, **options: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(params, lr=0.1, max_iter=4, history_size=3, **options)


class InGroups(torch.optim.SGD):
    """Keeps a flat buffer over all parameters as an attribute, from the first step on."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.flat = torch.cat([p.detach().flatten() for g in self.param_groups for p in g["params"]])
        return super().step(closure)


class Blocks(torch.optim.SGD):
    """Quantises the state of large tensors only, in blocks of 64, so small parameters do not show it."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for param in (p for group in self.param_groups for p in group["params"] if p.numel() > 4096):
            self.state[param]["scales"] = torch.zeros(param.numel() // 64)
        return super().step(closure)


class Unlike(torch.optim.SGD):
    """Keeps flat state per parameter; it cannot be copied, because its constructor is required."""

    def __setstate__(self, state: Any) -> None:
        raise NotImplementedError

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for param in (p for group in self.param_groups for p in group["params"]):
            self.state[param]["lists"] = [param.detach().flatten()]
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            lbfgs,
            r"got LBFGS whose state '\w+' of a parameter of shape \[3, 4, 5, 6\] is a tensor of shape",
        ),
        (InGroups, "got InGroups with tensors in 'flat' whose sizes depend on"),
    ],
)
def test_state_that_cannot_be_cut_is_refused_at_construction(kind: Any, message: str) -> None:
    model = plain()
    optimizer = kind(model.parameters())
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^optimizer: {message}.*shrink=False, or a state_cutter"):
        make(model, optimizer, shrink=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert not optimizer._optimizer_step_post_hooks and not optimizer.state
    make(model, optimizer)
    other = plain()
    make(other, kind(other.parameters()), shrink=True, state_cutter=lambda param, name, value, plan: value)


@pytest.mark.parametrize("kind", [Blocks, Unlike])
def test_state_that_only_a_step_shows_is_refused_at_the_first_one(kind: Any) -> None:
    model = plain()
    optimizer = kind(model.parameters(), lr=0.01)
    make(model, optimizer, shrink=True)
    with pytest.raises(
        ValueError, match=rf"^optimizer: got {kind.__name__} whose state '\w+' of a parameter of shape \["
    ):
        steps(model, optimizer, 1)
    with pytest.raises(
        ValueError, match=rf"^optimizer: got {kind.__name__} whose state '\w+' of a parameter of shape \["
    ):
        make(model, kind(model.parameters(), lr=0.01) if not optimizer.state else optimizer, shrink=True)


KNOWN = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_other_optimizers_of_torch_shrink(name: str) -> None:
    model = plain()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    pruner = make(model, optimizer, shrink=True)
    steps(model, optimizer)
    assert pruner.finished
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in plain().parameters())


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_masks_hold_through_a_line_search(search: str | None) -> None:
    """The model is masked in every call of the closure and at the end of every step."""
    model = plain()
    optimizer = lbfgs(model.parameters(), line_search_fn=search)
    pruner = make(model, optimizer)
    calls = 0
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            assert gone(pruner) == 0
            loss = model(batch(step, dtype=DTYPE)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert gone(pruner) == 0
    assert calls > 2 * STEPS
    assert pruner.finished and pruner.metrics()["macs_share"] <= 0.4
    x = batch(9, dtype=DTYPE)
    assert sparsekern.verify(model.eval(), pruner.compact().eval(), x) < 1e-12
    assert torch.isfinite(model(x)).all()


class Halves(nn.Module):
    """An encoder and a decoder, each with its own Pruner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1))
        self.decoder = nn.Sequential(nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 2, 1))
        self.to(DTYPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x).sin())


def prune_halves(model: Halves, optimizers: list[Any], **options: Any) -> list[Pruner]:
    x = batch(0, dtype=DTYPE)
    shared: dict[str, Any] = {"keep": 0.5, "steps": STEPS, "events": 3, "round_to": 1} | options
    encoder = Pruner(model.encoder, optimizers[0], x, **shared)
    decoder = Pruner(model.decoder, optimizers[-1], model.encoder(x).detach(), **shared)
    return [encoder, decoder]


HALVES = {
    "ours": (lambda params: sparsekern.optim.AdamW(params, lr=0.01), {}),
    "ours, shrinking": (lambda params: sparsekern.optim.AdamW(params, lr=0.01), {"shrink": True}),
    "torch's": (lambda params: torch.optim.AdamW(params, lr=0.01), {}),
    "torch's, shrinking": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), {"shrink": True}),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("kind", "options"), HALVES.values(), ids=HALVES)
def test_two_pruners_under_one_optimizer_prune_as_under_one_each(
    kind: Any, options: dict[str, Any], inside: bool
) -> None:
    together, apart = Halves(), Halves()
    one = kind(together.parameters())
    two = [kind(apart.encoder.parameters()), kind(apart.decoder.parameters())]
    if inside:
        if not isinstance(one, sparsekern.optim.AdamW):
            pytest.skip("in_backward takes an optimizer of ours")
        for optimizer in (one, *two):
            sparsekern.optim.in_backward(optimizer)
    ours, theirs = prune_halves(together, [one], **options), prune_halves(apart, two, **options)
    for step in range(STEPS):
        for model, optimizers in ((together, [one]), (apart, two)):
            model(batch(step, dtype=DTYPE)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for mine, his in zip(ours, theirs, strict=True):
        assert mine.finished and mine.metrics() == his.metrics()
        rows = mine._network.rows.table.state_dict(), his._network.rows.table.state_dict()
        for name in rows[0]:
            assert torch.equal(torch.as_tensor(rows[0][name]), torch.as_tensor(rows[1][name])), name
    for param, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(param, other)
    ours[0].detach()
    masked = [gone(pruner) for pruner in ours]
    steps(together, one, 2)
    assert masked[1] == gone(ours[1]) == 0, "the other one goes on"


@pytest.mark.parametrize("kind", [sparsekern.optim.SGD, torch.optim.SGD])
def test_a_second_pruner_of_the_same_parameters_is_refused_until_the_first_is_detached(kind: Any) -> None:
    model = plain()
    optimizer = kind(model.parameters(), lr=0.05)
    first = make(model, optimizer)
    hooks = len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)
    for again in (model, model.stem):
        with pytest.raises(RuntimeError, match=r"^optimizer: got a SGD .*of \d+ of .*pruner.detach\(\)"):
            make(again, Forwards(optimizer))
    assert hooks == (len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks))
    first.detach()
    second = make(model, optimizer)
    steps(model, optimizer)
    assert second.finished and not first.finished


@pytest.mark.parametrize("kind", [sparsekern.optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize("cycle", [False, True])
def test_a_pruner_that_nobody_holds_goes_on_and_gives_way(kind: Any, cycle: bool) -> None:
    model = plain()
    optimizer = kind(model.parameters(), lr=0.05)
    held = make(model, optimizer)
    if cycle:
        held.itself = held  # type: ignore[attr-defined]
    del held
    steps(model, optimizer)
    assert not model.stem[1].weight.all(), "it has masked gates all the same"
    pruner = make(model, optimizer, keep=0.2)
    assert pruner.metrics()["step"] == 0
    steps(model, optimizer)
    assert pruner.finished and pruner.metrics()["macs_share"] <= 0.2
    pruner.detach()
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    assert not getattr(optimizer, "tables", ())
