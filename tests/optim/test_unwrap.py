"""Optimizers inside wrappers: found where a step of the wrapper calls them, else refused by name."""

from __future__ import annotations

import functools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before what imports torchvision
from sparsekern import optim
from sparsekern.optim import unwrap_optimizer


class Forwards:
    """Holds an optimizer and forwards calls to it."""

    def __init__(self, inner: Any) -> None:
        self.anything = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.anything.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.anything.step(closure)


class Slotted:
    __slots__ = ("param_groups", "within")

    def __init__(self, inner: Any) -> None:
        self.within, self.param_groups = inner, inner.param_groups

    def step(self) -> None:
        self.within.step()


class Lookahead(Optimizer):
    """Keeps slow weights in its own state and, like most wrappers, skips Optimizer's constructor."""

    def __init__(self, inner: Optimizer, every: int = 3, rate: float = 0.5) -> None:
        self.optimizer, self.every, self.rate, self.count = inner, every, rate, 0
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.state = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.optimizer.step(closure)
        self.count += 1
        for param in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[param].setdefault("slow", param.detach().clone())
            if self.count % self.every == 0:
                slow.lerp_(param, self.rate)
                param.copy_(slow)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class InLists(Lookahead):
    """Keeps slow weights in a list, which does not show the parameter that they belong to."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Initialised(Optimizer):
    """Calls Optimizer's constructor, as SAM does, so it runs step hooks itself."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.base_optimizer = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.base_optimizer.step(closure)


class Dealt(Optimizer):
    """Distributes its parameters over two optimizers."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, {"lr": 0.1})
        self.each = [torch.optim.SGD(params[:1], lr=0.1), torch.optim.SGD(params[1:], lr=0.1)]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for each in self.each:
            each.step()


def parameters() -> list[Parameter]:
    return [Parameter(torch.ones(4, 3)), Parameter(torch.ones(4))]


def accelerated(inner: Optimizer) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(inner)


def in_lightning(inner: Optimizer) -> Any:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    wrapped = LightningOptimizer(inner)
    # The Trainer's part: the work of a strategy without precision plugins.
    wrapped._strategy = SimpleNamespace(optimizer_step=lambda of, closure, **_: of.step(closure))
    return wrapped


def in_fabric(inner: Optimizer) -> Any:
    from lightning.fabric import Fabric

    return Fabric(accelerator="cpu").setup_optimizers(inner)


WRAPPERS = {
    "nothing": lambda inner: inner,
    "forwards": Forwards,
    "slots": Slotted,
    "lookahead": Lookahead,
    "initialised": Initialised,
    "accelerate": accelerated,
    "lightning": in_lightning,
    "fabric": in_fabric,
    "chain": lambda inner: Forwards(Lookahead(accelerated(inner))),
}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("make", [torch.optim.SGD, optim.AdamW])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_optimizer_whose_steps_move_the_parameters_is_found(wrap: Any, make: Any) -> None:
    params = parameters()
    inner = make(params, lr=0.1)
    wrapped = wrap(inner)
    found = unwrap_optimizer(wrapped)
    assert found.optimizer is inner
    assert found.states[0] is inner.state
    assert not found.parts
    assert unwrap_optimizer(found) is found
    calls: list[int] = []
    found.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for param in params:
        param.grad = torch.ones_like(param)
    wrapped.step()
    assert calls == [1]


def test_state_of_wrappers_is_found_too() -> None:
    wrapped = Lookahead(torch.optim.SGD(parameters(), lr=0.1))
    found = unwrap_optimizer(Forwards(wrapped))
    assert any(state is wrapped.state for state in found.states)
    assert len(found.states) == 2


def test_one_that_deals_its_parameters_out_is_watched_as_a_whole() -> None:
    dealing = Dealt(parameters())
    found = unwrap_optimizer(Forwards(dealing))
    assert found.optimizer is dealing
    assert list(found.parts) == dealing.each
    assert len(found.states) == 3


class Two:
    def __init__(self) -> None:
        self.one, self.other = torch.optim.SGD(parameters(), lr=0.1), torch.optim.Adam(parameters())
        self.param_groups = self.one.param_groups

    def step(self) -> None: ...


class Loop:
    """Holds itself and no optimizer."""

    def __init__(self) -> None:
        self.inner, self.param_groups = [self], []

    def step(self) -> None: ...


def _scheduler() -> Any:
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(parameters(), lr=0.1), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "got None, expected a torch.optim.Optimizer"),
        (lambda: torch.optim.Adam, "got the class Adam"),
        (lambda: parameters, "got function 'parameters'"),
        (lambda: functools.partial(torch.optim.SGD, lr=0.1), "got partial"),
        (lambda: [torch.optim.SGD(parameters(), lr=0.1)], "got list"),
        (lambda: nn.Linear(3, 4), "got Linear"),
        (lambda: "adam", "got str"),
        (lambda: torch.ones(3), "got Tensor"),
        (Loop, "got Loop"),
        (_scheduler, "got StepLR.*pass scheduler.optimizer"),
        (Two, "got a Two that holds 2 optimizers .SGD in 'one', Adam in 'other'.*pass the one"),
        (
            lambda: Forwards(InLists(torch.optim.SGD(parameters(), lr=0.1))),
            "got a InLists that keeps 2 tensors of parameters' shapes in 'slow'.*or pass the SGD inside",
        ),
    ],
)
def test_anything_else_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^optimizer: {message}"):
        unwrap_optimizer(make())


def test_in_backward_takes_a_wrapper() -> None:
    params = parameters()
    inner = optim.SGD(params, lr=0.5)
    optim.in_backward(Forwards(inner))  # type: ignore[arg-type]
    sum((p.sum() for p in params), torch.zeros(())).backward()
    assert all(isinstance(p.grad, optim.UsedGradient) for p in params)
    expected: list[Tensor] = [torch.full_like(p, 0.5) for p in params]
    torch.testing.assert_close([p.detach() for p in params], expected)
    with pytest.raises(TypeError, match="^optimizer: got SGD, expected one of sparsekern.optim"):
        optim.in_backward(Forwards(torch.optim.SGD(params, lr=0.1)))  # type: ignore[arg-type]
