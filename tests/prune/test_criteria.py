from __future__ import annotations

import numpy as np
import pytest
import torch
from prune.networks import Plain, batch

from sparsekern import criteria
from sparsekern.graph import ChannelGraph, trace
from sparsekern.prune.state.statistics import Statistics


@pytest.fixture
def model() -> Plain:
    torch.manual_seed(0)
    return Plain()


@pytest.fixture
def graph(model: Plain) -> ChannelGraph:
    return trace(model, batch(0))


def statistics(model: Plain, graph: ChannelGraph, **changes: object) -> Statistics:
    random = np.random.default_rng(0)
    options = {
        "graph": graph,
        "live": np.ones(graph.num_channels, bool),
        "activity": random.random(graph.num_channels),
        "taylor": random.random(graph.num_channels),
        "magnitude": random.random(graph.num_channels),
        "parameters": dict(model.named_parameters()),
    }
    return Statistics(**(options | changes))


def group_named(graph: ChannelGraph, part: str) -> np.ndarray:
    return next(group.channels for group in graph.groups if part in group.name)


def test_counts_are_relative_to_their_group(model: Plain, graph: ChannelGraph) -> None:
    given = statistics(model, graph)
    saliency = criteria.GradientCount()(given)
    for group in graph.groups:
        assert saliency[group.channels].mean() == pytest.approx(1)
    raw = criteria.GradientCount(relative=False)(given)
    assert (raw == given.activity).all()


def test_a_silent_group_has_equal_counts(model: Plain, graph: ChannelGraph) -> None:
    saliency = criteria.GradientCount()(statistics(model, graph, activity=np.zeros(graph.num_channels)))
    assert (saliency == 1).all()


def test_criteria_combine(model: Plain, graph: ChannelGraph) -> None:
    given = statistics(model, graph)
    both = 2 * criteria.Taylor() * criteria.Magnitude() + criteria.Random(3)
    expected = 2 * given.taylor * given.magnitude + criteria.Random(3)(given)
    np.testing.assert_allclose(both(given), expected)
    with pytest.raises(TypeError, match="^criterion: got .*, expected a criterion or a number"):
        criteria.Taylor() * "much"  # type: ignore[operator]


def test_random_is_fixed_by_its_seed(model: Plain, graph: ChannelGraph) -> None:
    given = statistics(model, graph)
    assert (criteria.Random(1)(given) == criteria.Random(1)(given)).all()
    assert (criteria.Random(1)(given) != criteria.Random(2)(given)).any()


def test_shuffled_keeps_each_groups_values_and_moves_them(model: Plain, graph: ChannelGraph) -> None:
    given = statistics(model, graph)
    shuffled = criteria.Shuffled(of=criteria.Taylor())(given)
    assert (shuffled != given.taylor).any()
    for group in graph.groups:
        assert sorted(shuffled[group.channels]) == sorted(given.taylor[group.channels])


def test_shuffled_leaves_channels_that_are_gone(model: Plain, graph: ChannelGraph) -> None:
    live = np.arange(graph.num_channels) % 2 == 0
    given = statistics(model, graph, live=live)
    shuffled = criteria.Shuffled(of=criteria.Taylor())(given)
    assert (shuffled[~live] == given.taylor[~live]).all()


def test_of_two_duplicates_the_less_salient_counts_for_nothing(model: Plain, graph: ChannelGraph) -> None:
    stem = group_named(graph, "stem")
    with torch.no_grad():
        # A positive multiple of the filter is the same filter behind a batch norm.
        model.stem[0].weight[5] = 3 * model.stem[0].weight[2]
    taylor = np.ones(graph.num_channels)
    taylor[stem[2]] = 0.5
    given = statistics(model, graph, taylor=taylor)
    saliency = criteria.Redundancy(of=criteria.Taylor())(given)
    assert saliency[stem[2]] == pytest.approx(0, abs=1e-5)
    assert saliency[stem[5]] == 1
    others = np.setdiff1d(np.arange(graph.num_channels), [stem[2]])
    assert (saliency[others] > 0.9).all()


def test_partners_know_the_coefficient(model: Plain, graph: ChannelGraph) -> None:
    stem = group_named(graph, "stem")
    with torch.no_grad():
        model.stem[0].weight[5] = model.stem[0].weight[2]
        model.stem[1].weight[5] = 0.5
        model.stem[1].bias[2], model.stem[1].bias[5] = 0.4, 0.2
    saliency = np.ones(graph.num_channels)
    saliency[stem[5]] = 0.1
    partners = criteria.Redundancy().partners(statistics(model, graph), saliency)
    assert partners is not None
    assert partners.channel[stem[5]] == stem[2]
    assert partners.coefficient[stem[5]] == pytest.approx(0.5, rel=1e-5)
    assert (partners.channel >= 0).sum() == 1


def test_folding_can_be_switched_off(model: Plain, graph: ChannelGraph) -> None:
    criterion = criteria.Redundancy(fold=False)
    assert criterion.partners(statistics(model, graph), np.ones(graph.num_channels)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: criteria.GradientCount(level="pixel"), "level: got 'pixel'"),
        (lambda: criteria.Redundancy(threshold=1.0), "threshold: got 1.0"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
