"""Groups of a role keep the same width, through every allocator, floor, rounding and saved state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsekern import Pruner, allocate, criteria, optim, prune_once, trace
from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.allocate import Allocator, Problem, smallest
from sparsekern.prune.decide.problem import Blocks
from sparsekern.prune.decide.roles import Roles, role_name

ALLOCATORS = [allocate.Global(), allocate.Uniform(), allocate.Flat()]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Three layers, the third of another width, and a list of two heads beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(16), Block(16), Block(12)])
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in "ab"])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.cat([head(x) for head in self.heads], 1)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return trace(Stack(), X)


def widths(graph: ChannelGraph, kept: np.ndarray) -> dict[str, int]:
    return {group.name: int(kept[group.channels].sum()) for group in graph.groups}


def problem(graph: ChannelGraph, keep: float, equal: Any = "role", **changes: Any) -> Problem:
    saliency = np.random.default_rng(0).random(graph.num_channels)
    budget = keep * graph.cost(graph.all_channels()).macs
    floors = np.ones(len(graph.groups), np.int64)
    roles = Roles.of(equal, Stack(), graph).of_problem()
    made = Problem(graph, saliency, graph.all_channels(), budget, "macs", floors, **roles)
    return replace(made, **changes)


def assert_alike(found: dict[str, int]) -> None:
    assert found["layers.0.up"] == found["layers.1.up"]
    assert found["heads.0.0"] == found["heads.1.0"]


def test_positions_are_taken_out_of_names() -> None:
    model = nn.ModuleDict({"0": Stack()})
    assert role_name(model, "0.layers.1.up") == "0.layers.*.up"
    assert role_name(model, "0.heads.1.0.weight") == "0.heads.*.*.weight"


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("round_to", [1, 3])
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.25])
def test_every_allocator_keeps_widths_equal_within_the_budget(
    graph: ChannelGraph, allocator: Allocator, keep: float, round_to: int
) -> None:
    task = problem(graph, keep, round_to=round_to)
    kept = task.checked(allocator(task))
    found = widths(graph, kept)
    assert_alike(found)
    assert task.cost(kept) <= task.budget
    dense = widths(graph, graph.all_channels())
    assert all(n % round_to == 0 or n == dense[name] for name, n in found.items())


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_the_highest_floor_of_a_role_holds(graph: ChannelGraph, allocator: Allocator) -> None:
    floors = np.array([5 if group.name == "layers.1.up" else 2 for group in graph.groups])
    task = problem(graph, 1e-6, floors=floors)
    kept = allocator(task)
    assert (kept == smallest(task)).all()
    assert widths(graph, kept) == {"layers.0.up": 5, "layers.1.up": 5, "layers.2.up": 2} | {
        f"heads.{n}.0": 2 for n in range(2)
    }


def test_blocks_of_a_role_go_by_their_common_saliency(graph: ChannelGraph) -> None:
    # Alone, the channels of the first layer are the least salient; with their partners they are the most.
    saliency = np.ones(graph.num_channels)
    for group in graph.groups:
        if group.name in ("layers.0.up", "layers.1.up"):
            saliency[group.channels] = {"layers.0.up": 0.5, "layers.1.up": 9.0}[group.name]
    task = problem(graph, 0.9, saliency=saliency)
    found = widths(graph, allocate.Global(balance=0.0)(task))
    assert found["layers.0.up"] == found["layers.1.up"] == 16 and found["layers.2.up"] < 12
    alone = problem(graph, 0.9, equal=None, saliency=saliency)
    assert widths(graph, allocate.Global(balance=0.0)(alone))["layers.0.up"] < 16


class Stairs:
    """A latency that falls only with every fourth channel of a group."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph

    def cost(self, kept: np.ndarray) -> float:
        return float(sum(-(-n // 4) for n in widths(self.graph, kept).values()))

    def price(self, kept: np.ndarray) -> np.ndarray:
        return np.where(kept, 0.25, 0.0)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_a_latency_is_met_with_equal_widths(graph: ChannelGraph, allocator: Allocator) -> None:
    stairs = Stairs(graph)
    task = problem(graph, 1.0, pricing=stairs, budget=9.0, whole=stairs.cost(graph.all_channels()))
    kept = task.checked(allocator(task))
    assert stairs.cost(kept) <= 9.0
    assert_alike(widths(graph, kept))


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_a_mapping_gives_divisors(graph: ChannelGraph, allocator: Allocator) -> None:
    task = problem(graph, 0.5, equal={"layers.*.up": 4, "*": 3}, round_to=5)
    found = widths(graph, task.checked(allocator(task)))
    assert_alike(found)
    assert {found[f"layers.{n}.up"] % 4 for n in range(3)} == {0} == {found["heads.0.0"] % 3}


def test_widths_that_a_configuration_accepts_are_the_only_ones(graph: ChannelGraph) -> None:
    task = problem(graph, 1.0)
    (role,) = {int(task.roles[group.id]) for group in graph.groups if group.name.startswith("layers.0")}
    stepped = replace(task, steps={role: np.array([1, 2, 5, 8, 16])})
    for allocator in ALLOCATORS:
        for keep in (0.9, 0.7, 0.4, 0.2):
            kept = allocator(replace(stepped, budget=keep * task.whole))
            assert widths(graph, kept)["layers.1.up"] in (1, 2, 5, 8, 16)
            assert stepped.cost(kept) <= keep * task.whole


@pytest.mark.parametrize(("round_to", "steps", "left"), [(1, None, 13), (4, None, 12), (1, [8, 16], 8)])
def test_widths_that_came_apart_are_equal_again(
    graph: ChannelGraph, round_to: int, steps: list[int] | None, left: int
) -> None:
    live = graph.all_channels()
    live[next(g for g in graph.groups if g.name == "layers.1.up").channels[:3]] = False
    task = problem(graph, 1.0, live=live, round_to=round_to)
    if steps is not None:
        (role,) = {int(task.roles[group.id]) for group in graph.groups if group.name.startswith("layers.0")}
        task = replace(task, steps={role: np.array(steps)})
    for allocator in ALLOCATORS:
        found = widths(graph, task.checked(allocator(task)))
        assert (found["layers.0.up"], found["layers.1.up"]) == (left, left)
    assert len(Blocks.cut(task).channel) == live.sum() - (13 - left) * 2 - 3


def pruner(model: nn.Module | None = None, **options: Any) -> Pruner:
    model = model or Stack()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    return Pruner(model, optimizer, X, **{"keep": 0.5, "steps": 12, "events": 3, "equal": "role", **options})


def train(made: Pruner, steps: int) -> None:
    model, optimizer = made._network.model, made._network.optimizer
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"shrink": True, "round_to": 1}, {"round_to": 4}], ids=str)
def test_a_training_ends_with_equal_widths(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = pruner(**options)
    for left in made.forecast().stages[1:]:
        assert left.macs <= made.forecast().stages[0].macs
    for _ in range(12):
        train(made, 1)
        assert_alike({name: live for name, (live, _) in made.widths().items()})
    assert made.finished and made.metrics()["macs_share"] <= 0.5
    small = made.compact()
    assert small.layers[0].up.out_features == small.layers[1].up.out_features < 16


def test_a_changed_setting_is_refused_and_the_same_one_goes_on() -> None:
    made = pruner(equal={"layers*": 2})
    train(made, 5)
    state = made.state_dict()
    for other in ("role", None, {"layers*": 4}):
        with pytest.raises(ValueError, match=r"^state: got one saved with equal=.*, expected equal="):
            pruner(equal=other).load_state_dict(state)
    again = pruner(equal={"layers*": 2})
    again.load_state_dict(state)
    assert again.widths() == made.widths()
    older = pruner(equal=None).state_dict()
    del older["settings"]["equal"]
    pruner(equal=None).load_state_dict(older)


def test_one_layer_that_stays_keeps_the_same_part_of_the_others() -> None:
    model = Stack()
    model.layers = nn.ModuleList([Block(16) for _ in range(3)])
    made = pruner(model, protect=["layers.1.up"], keep=0.9)
    assert not [name for name in made.widths() if name.startswith("layers")]
    assert "layers.1.up.weight cannot get the same width" in made.graph.explain("layers.0.up.weight")
    assert "layers.0.up" in pruner(model, protect=["layers.1.up"], keep=0.9, equal=None).widths()


def test_a_trained_network_too() -> None:
    found = prune_once(Stack(), X, keep=0.5, select=criteria.Magnitude(), equal="role").network
    assert found.layers[0].up.out_features == found.layers[1].up.out_features < 16


class Lopsided(Allocator):
    def __call__(self, problem: Problem) -> np.ndarray:
        kept = problem.live.copy()
        kept[problem.graph.groups[0].channels[1:]] = False
        return kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"equal": "layer"}, "^equal: got 'layer', expected 'role'"),
        ({"equal": 4}, "^equal: got 4, expected 'role'"),
        ({"equal": {3: 4}}, "^equal: got {3: 4}, expected 'role'"),
        ({"equal": {"*": 0}}, r"^equal: got 0 for '\*', expected a whole number >= 1"),
        ({"equal": {"*": True}}, r"^equal: got True for '\*', expected a whole number >= 1"),
        ({"equal": {"nowhere": 2}}, "^equal: got 'nowhere', which matches no role, expected .*layers"),
        ({"keep": 0.01, "min_channels": 8}, r"^keep: .* \(min_channels, round_to=1 and equal\)"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner(**changes)


def test_an_allocator_that_ignores_roles_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^allocate: got 16 channels of layers\.1\.up and 1 of layers\.0"):
        prune_once(Stack(), X, keep=0.9, select=criteria.Magnitude(), allocate=Lopsided(), equal="role")
