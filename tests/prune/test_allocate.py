from __future__ import annotations

import numpy as np
import pytest
from prune.networks import Plain, Residual, batch

from sparsekern.graph import ChannelGraph, trace
from sparsekern.prune.decide.allocate import Allocator, Flat, Global, Problem, Uniform, smallest

ALLOCATORS = [Global(), Uniform(), Flat()]


@pytest.fixture(scope="module", params=[Plain, Residual])
def graph(request: pytest.FixtureRequest) -> ChannelGraph:
    return trace(request.param(), batch(0))


def problem(graph: ChannelGraph, keep: float, **changes: object) -> Problem:
    everything = np.ones(graph.num_channels, bool)
    options = {
        "graph": graph,
        "saliency": np.random.default_rng(0).random(graph.num_channels),
        "live": everything,
        "budget": keep * graph.cost(everything).macs,
        "of": "macs",
        "floors": np.ones(len(graph.groups), np.int64),
        "round_to": 1,
    }
    return Problem(**(options | changes))


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("keep", [0.8, 0.4, 0.2])
def test_meets_the_budget_to_one_block(
    graph: ChannelGraph, allocator: Allocator, keep: float, round_to: int
) -> None:
    task = problem(graph, keep, round_to=round_to)
    kept = allocator(task)
    assert task.cost(kept) <= task.budget
    # Uniform and Flat move all groups at once, so only Global comes within one block of the budget.
    if isinstance(allocator, Global):
        block = round_to * graph.price(np.ones(graph.num_channels, bool), "macs").max()
        assert task.budget - task.cost(kept) <= block


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_widths_are_whole_blocks_and_the_least_salient_go(graph: ChannelGraph, allocator: Allocator) -> None:
    task = problem(graph, 0.4, round_to=4)
    kept = allocator(task)
    for group in graph.groups:
        stay = kept[group.channels]
        assert stay.sum() % 4 == 0 or stay.all()
        saliency = task.saliency[group.channels]
        if not stay.all():
            assert saliency[stay].min() >= saliency[~stay].max()


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_floors_hold_where_the_budget_cannot_be_met(graph: ChannelGraph, allocator: Allocator) -> None:
    floors = np.arange(2, 2 + len(graph.groups))
    task = problem(graph, 1e-6, floors=floors)
    kept = allocator(task)
    assert [int(kept[group.channels].sum()) for group in graph.groups] == floors.tolist()
    assert (kept == smallest(task)).all()


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_what_is_gone_stays_gone(graph: ChannelGraph, allocator: Allocator) -> None:
    live = np.random.default_rng(1).random(graph.num_channels) < 0.8
    kept = allocator(problem(graph, 0.4, live=live))
    assert not (kept & ~live).any()


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_nothing_goes_within_the_budget(graph: ChannelGraph, allocator: Allocator) -> None:
    assert allocator(problem(graph, 1.0)).all()


def test_parameters_as_the_unit(graph: ChannelGraph) -> None:
    everything = np.ones(graph.num_channels, bool)
    task = problem(graph, 0.3, of="params", budget=0.3 * graph.cost(everything).params)
    assert graph.cost(Global()(task)).params <= task.budget


def test_uniform_keeps_one_share_and_flat_one_width() -> None:
    graph = trace(Plain(), batch(0))
    sizes = np.array([len(group.channels) for group in graph.groups])

    def widths(allocator: Allocator) -> np.ndarray:
        kept = allocator(problem(graph, 0.4))
        return np.array([int(kept[group.channels].sum()) for group in graph.groups])

    assert np.abs(widths(Uniform()) / sizes - (widths(Uniform()) / sizes).mean()).max() <= 1 / sizes.min()
    assert np.ptp(widths(Flat())) <= 1


def test_a_cheap_loss_goes_before_a_dear_one() -> None:
    graph = trace(Plain(), batch(0))
    saliency = np.ones(graph.num_channels)
    precious = graph.groups[0].channels
    saliency[precious] = 1e3
    kept = Global()(problem(graph, 0.3, saliency=saliency))
    assert kept[precious].all()
