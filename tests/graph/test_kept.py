"""Tensors that a forward keeps on its modules: they are copied, traced, and keep their channels."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from graph.exactness import check, choose, mask
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsekern
from sparsekern._copying import copied
from sparsekern.compact import compact, make_plan, verify
from sparsekern.graph import trace

X = torch.rand(2, 3, 8, 8)
Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Bag:
    """A container as users write them."""

    features: dict[str, Any] = field(default_factory=dict)


class Slotted:
    __slots__ = ("value",)


class Net(nn.Module):
    """Stores the result of ``store`` on the first feature map; ``place`` is the container."""

    shared: ClassVar[list[Tensor]] = []

    def __init__(self, store: Callable[[Net, Tensor], None], place: Any = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)
        self.store, self.place = store, place

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).relu()
        self.store(self, y)
        return self.head(self.second(y).relu())


def as_attribute(net: Net, y: Tensor) -> None:
    net.kept = y


def over_none(net: Net, y: Tensor) -> None:
    net.place = y


def under_a_key(net: Net, y: Tensor) -> None:
    net.place["y"] = y


def appended(net: Net, y: Tensor) -> None:
    net.place.append(y)


def cleared_first(net: Net, y: Tensor) -> None:
    net.place.clear()
    net.place.append(y)


def added(net: Net, y: Tensor) -> None:
    net.place.add(y)


def nested(net: Net, y: Tensor) -> None:
    net.place["all"] = [Pair(y, {"again": y})]


def in_a_dataclass(net: Net, y: Tensor) -> None:
    net.place.features["y"] = y


def as_value(net: Net, y: Tensor) -> None:
    net.place.value = y


def on_the_class(net: Net, y: Tensor) -> None:
    del Net.shared[:]
    Net.shared.append(y)


def on_another_module(net: Net, y: Tensor) -> None:
    net.second.seen = y


WAYS: list[tuple[Callable[[Net, Tensor], None], Callable[[], Any]]] = [
    (as_attribute, lambda: None),
    (over_none, lambda: None),
    (under_a_key, dict),
    (under_a_key, OrderedDict),
    (appended, list),
    (appended, lambda: deque(maxlen=2)),
    (cleared_first, list),
    (added, set),
    (nested, dict),
    (in_a_dataclass, Bag),
    (as_value, SimpleNamespace),
    (as_value, Slotted),
    (on_the_class, lambda: None),
    (on_another_module, lambda: None),
]
WAY_NAMES = [f"{store.__name__}-{type(place()).__name__}" for store, place in WAYS]


@pytest.mark.parametrize(
    ("store", "place"), WAYS, ids=[f"{store.__name__}-{type(place()).__name__}" for store, place in WAYS]
)
def test_what_is_kept_keeps_its_channels_and_is_left_alone(
    store: Callable[[Net, Tensor], None], place: Callable[[], Any]
) -> None:
    net = Net(store, place())
    net(X)
    before, shared = dict(vars(net)), list(Net.shared)
    graph = trace(net, X)
    assert [group.name for group in graph.groups] == ["second"]
    assert dict(graph.frozen)["first.weight"].endswith("where a loss may read it")
    assert "where a loss may read it" in str(graph)
    kept = choose(graph, 0)
    small, masked = compact(net, make_plan(graph, kept)), mask(net, graph, kept)
    assert vars(net).keys() == before.keys()
    assert all(vars(net)[name] is value for name, value in before.items())
    assert [id(tensor) for tensor in Net.shared] == [id(tensor) for tensor in shared]
    net(X).sum().backward()
    assert verify(masked, small, X) < 1e-6


def test_before_the_first_forward() -> None:
    assert [group.name for group in trace(Net(as_attribute), X).groups] == ["second"]


def test_a_copy_shares_what_the_model_shares_and_has_no_history() -> None:
    net = Net(under_a_key, {})
    net(X)
    net.again = net.place
    net.alone = net.place["y"]
    twin = copied(net)
    y = net.place["y"]
    assert twin.again is twin.place
    assert twin.place["y"] is twin.alone
    assert torch.equal(twin.alone, y)
    assert twin.alone.data_ptr() != y.data_ptr()
    assert y.grad_fn is not None
    assert twin.alone.grad_fn is None


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_was_kept_without_gradients_can_be_copied(way: Callable[[], Any]) -> None:
    net = Net(under_a_key, {})
    with way():
        net(X)
    assert torch.equal(copied(net).place["y"], net.place["y"])
    assert trace(net, X).num_channels == 8


class Heads(nn.Module):
    """Two modules put into one list, which the network returns in training only."""

    def __init__(self) -> None:
        super().__init__()
        outputs: list[Tensor] = [torch.rand(1)] * 2
        self.blocks = nn.ModuleList([Block(outputs, 0), Block(outputs, 1)])
        self.outputs = outputs
        self.stem = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x).relu()
        for block in self.blocks:
            y = block(y)
        return (y, *self.outputs) if self.training else y


class Block(nn.Module):
    def __init__(self, outputs: list[Tensor], index: int) -> None:
        super().__init__()
        self.outputs, self.index = outputs, index
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu()
        self.outputs[self.index] = self.head(y)
        return y


@pytest.mark.parametrize("ran", [False, True])
def test_modules_that_share_a_list(ran: bool) -> None:
    net = Heads()
    if ran:
        net(X)
    graph = check(net, (X,))
    assert [group.name for group in graph.groups] == ["stem", "blocks.0.body"]
    assert net.blocks[0].outputs is net.blocks[1].outputs


def test_a_hidden_state_of_the_last_forward() -> None:
    class Stateful(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x)).relu()
            y = y if self.place is None else y + self.place
            self.place = y.detach()
            return self.head(self.second(y).relu())

    net = Stateful(as_attribute)
    net(X)
    assert [group.name for group in trace(net, X).groups] == ["second"]


def test_a_weight_that_is_made_in_every_forward_is_no_feature() -> None:
    net = Net(lambda net, y: None)
    prune.l1_unstructured(net.first, "weight", 0.3)
    net(X)
    assert trace(net, X).num_channels == 16


def test_a_whole_training() -> None:
    torch.manual_seed(0)
    net = Net(nested, {})
    optimizer = sparsekern.optim.SGD(net.parameters(), lr=0.01)
    pruner = sparsekern.Pruner(net, optimizer, X, keep=0.7, of="params", steps=10, shrink=True, round_to=1)
    net(X)
    assert pruner.forecast(measure=True).time_share
    for _ in range(10):
        (net(X).square().mean() + net.place["all"][0].first.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = net.place["all"][0].first
    small = pruner.compact()
    assert net.place["all"][0].first is kept
    assert verify(net, small, X) < 1e-6
    small(X)
    assert small.place["all"][0].first.shape == kept.shape
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in Net(nested, {}).parameters())


def test_prune_once_of_a_model_that_was_trained() -> None:
    net = Net(appended, [])
    net(X).sum().backward()
    batches = [(X, torch.zeros(2, 2, 8, 8))]
    small = sparsekern.prune_once(
        net, X, keep=0.7, of="params", calibration=batches, loss=nn.functional.mse_loss, round_to=1
    ).network
    assert small.second.out_channels < 8
    assert small.first.out_channels == 8
