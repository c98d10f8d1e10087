"""Hooks: those that belong to the model run in its copies, others watch and are left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph.exactness import check
from torch import Tensor, nn

from sparsekern._copying import copied
from sparsekern.graph import trace

X = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    """The head reads what a hook has kept of the first convolution's output."""

    def __init__(self, hook: Callable[[Net], Callable[..., Any]]) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)
        self.first.register_forward_hook(hook(self))

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features["first"] = output

    def keep_as(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features[name] = output

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        y = self.second(self.first(x).relu()).relu()
        return self.head(torch.cat([self.features.pop("first"), y], 1))


def method(net: Net) -> Callable[..., Any]:
    return net.keep


def part_of_a_method(net: Net) -> Callable[..., Any]:
    return functools.partial(net.keep_as, "first")


def closure(net: Net) -> Callable[..., Any]:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        net.features["first"] = output

    return keep


def closure_over_a_container(net: Net) -> Callable[..., Any]:
    features = net.features
    return lambda module, args, output: features.update(first=output)


def default_of_an_argument(net: Net) -> Callable[..., Any]:
    def keep(module: nn.Module, args: Any, output: Tensor, kept: Any = net.features) -> None:
        kept["first"] = output

    return keep


OWN = [method, part_of_a_method, closure, closure_over_a_container, default_of_an_argument]


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("hook", OWN)
def test_a_hook_that_the_forward_relies_on_runs(hook: Callable[[Net], Any], ran: bool) -> None:
    net = Net(hook)
    if ran:
        net(X)
    graph = check(net, (X,))
    assert [group.name for group in graph.groups] == ["first", "second"]


@pytest.mark.parametrize("hook", OWN)
def test_hooks_of_a_copy_refer_to_the_copy(hook: Callable[[Net], Any]) -> None:
    net = Net(hook)
    twin = copied(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(X).any()
    assert net(X).any()
    assert not net.features and not twin.features


def test_a_hook_that_changes_its_output_is_followed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[1].register_forward_pre_hook(lambda module, args: (torch.relu(args[0]),))
    assert len(check(model, (X,)).groups) == 2


def test_a_watching_hook_is_left_out() -> None:
    seen: list[Any] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    add = seen.append

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    def watch_by_a_method(module: nn.Module, args: Any, output: Tensor) -> None:
        add(model.training)

    model[0].register_forward_hook(watch)
    model[0].register_forward_hook(watch_by_a_method)
    assert trace(model, X).num_channels == 8
    assert not seen


def test_a_hook_that_needs_data_is_left_out() -> None:
    class Watched(nn.Sequential):
        def watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.mean = float(output.detach().numpy().mean())

    model = Watched(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model[0].register_forward_hook(model.watch)
    assert trace(model, X).num_channels == 8


def test_parameters_that_accelerate_loads_for_each_forward_pass_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))

    with pytest.raises(ValueError, match="model: got one whose 0 accelerate loads for each forward pass"):
        trace(accelerate.cpu_offload(network(), execution_device="cpu"), X)
    # Hooks that only move inputs are no obstacle, and the copy calls its own modules.
    placed = accelerate.dispatch_model(network(), device_map={"": "cpu"}, force_hooks=True)
    check(placed, [X])
