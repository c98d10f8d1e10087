"""Where steps are large, a choice comes as near to the budget as the next step allows, at every event."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from prune.test_roles import Stack, X, problem
from torch import Tensor, nn

from sparsekern import Pruner, allocate, optim, prune_once, trace
from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.allocate import Allocator, Problem, smallest
from sparsekern.prune.decide.problem import Blocks

ALLOCATORS = [allocate.Global(), allocate.Uniform(), allocate.Flat()]


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return trace(Stack(), X)


def random_problem(graph: ChannelGraph, seed: int) -> Problem:
    """Ties, floors, multiples, steps of a configuration, lost channels and both units, at random."""
    random = np.random.default_rng(seed)
    levels = random.uniform(0.1, 5.0, len(graph.groups))[graph.group_of]
    of = str(random.choice(["macs", "params"]))
    whole = float(getattr(graph.cost(graph.all_channels()), of))
    task = problem(
        graph,
        1.0,
        of=of,
        whole=whole,
        budget=random.uniform(0.1, 0.98) * whole,
        saliency=random.random(graph.num_channels) ** 3 * levels,
        round_to=int(random.integers(1, 5)),
        floors=random.integers(1, 4, len(graph.groups)),
    )
    if random.random() < 0.5:
        role = int(task.roles[0])
        task = replace(task, round_to=1, steps={role: np.array([1, 5, 11, len(graph.groups[0].channels)])})
    if random.random() < 0.3:
        task = replace(task, live=random.random(graph.num_channels) < 0.9)
    return task


def next_costs(task: Problem, kept: np.ndarray) -> list[float]:
    """The cost with one more step of each role that has lost any."""
    blocks, size = Blocks.cut(task), len(kept)
    stays = np.array([kept[blocks.channel[blocks.block == n]].all() for n in range(len(blocks.role))])
    assert (blocks.kept(stays, size) == kept).all()
    costs = []
    for role in np.unique(blocks.role):
        gone = np.flatnonzero((blocks.role == role) & ~stays)
        if len(gone):
            more = stays.copy()
            more[gone[0]] = True
            costs.append(task.cost(blocks.kept(more, size)))
    return costs


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_no_step_that_was_taken_still_fits(graph: ChannelGraph, allocator: Allocator) -> None:
    tried = 0
    for seed in range(60):
        task = random_problem(graph, seed)
        if task.cost(smallest(task)) > task.budget:
            continue
        tried += 1
        kept = task.checked(allocator(task))
        assert task.cost(kept) <= task.budget
        assert min(next_costs(task, kept), default=np.inf) > task.budget
    assert tried > 30


def test_small_steps_take_the_place_of_a_large_one(graph: ChannelGraph) -> None:
    # By saliency per cost the heads go first, at once; two channels of the third layer are enough.
    heads = [group.id for group in graph.groups if group.name.startswith("heads")]
    saliency = np.ones(graph.num_channels)
    for number in heads:
        saliency[graph.groups[number].channels] = 0.1
    saliency[[c for group in graph.groups if group.name == "layers.2.up" for c in group.channels]] = 0.9
    task = problem(graph, 1.0, saliency=saliency)
    task = replace(task, steps={int(task.roles[heads[0]]): np.array([1, 6])}, budget=task.whole - 100)
    kept = allocate.Global()(task)
    gone = {graph.groups[number].name for number in np.unique(graph.group_of[~kept])}
    assert gone == {"layers.2.up"}
    assert (~kept).sum() == 2


def test_groups_without_ties_are_left_alone(graph: ChannelGraph) -> None:
    # A free choice ends with the block that meets the budget; published results rest on these bits.
    task = problem(graph, 0.5, equal=None, round_to=4)
    assert not task.coarse.any()
    assert np.packbits(allocate.Global()(task)).tobytes().hex() == "8d6a833e462d7a"
    assert np.packbits(allocate.Uniform()(task)).tobytes().hex() == "8d6a833e462d7a"


class Wide(nn.Module):
    """Two layers with few, costly parts that go together, beside a cheap one with many."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 4 * 16), nn.ReLU(), nn.Linear(4 * 16, 16)) for _ in "ab"]
        )
        self.last = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("allocator", ALLOCATORS[:2], ids=repr)
def test_no_event_goes_below_the_last_budget(allocator: Allocator, shrink: bool) -> None:
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(8, 16)
    made = optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(
        model,
        made,
        x,
        keep=0.55,
        steps=30,
        warmup=0.1,
        finish=0.8,
        events=4,
        allocate=allocator,
        equal={"layers.*": 16, "last.*": 1},
        shrink=shrink,
    )
    for _ in range(30):
        (model(x).square().mean() + model(x).mean()).backward()
        made.step()
        made.zero_grad()
    # A step of both layers is 0.23 of the MACs, one channel of the last layer 0.004.
    assert 0.55 - 0.005 < pruner.metrics()["macs_share"] <= 0.55
    assert pruner.widths()["layers.0.0"] == pruner.widths()["layers.1.0"]


@pytest.mark.parametrize("keep", [0.3, 0.75])
def test_a_trained_network_comes_near_its_budget(keep: float) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"equal": {"layers.*": 16, "last.*": 1}, "keep": keep, "of": "params"}
    model = Wide()
    small = prune_once(model, torch.randn(8, 16), select="magnitude", **options).network
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert keep - 0.006 < after / before <= keep
