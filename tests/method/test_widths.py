from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern
from benchmarks.method.widths import flat, macs, rebuilt, scaled
from sparsekern.recipes.measure import macs as counted
from sparsekern.recipes.models import UNet

EXAMPLE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def unet():
    """The network of the study, and its channels."""
    model = UNet(3, 1, width=16)
    return model, sparsekern.trace(model, EXAMPLE)


@pytest.mark.parametrize("keep", [0.5, 0.2, 0.1, 0.05])
@pytest.mark.parametrize("shape", [scaled, flat])
def test_networks_that_are_small_from_the_start_have_the_macs_asked_for(unet, keep, shape):
    model, graph = unet
    widths = shape(graph, keep)
    # Counted by torch on the network itself, not by the graph that the widths were found with.
    small = rebuilt(model, graph, widths, seed=0)
    assert counted(small, EXAMPLE) == pytest.approx(keep * counted(model, EXAMPLE), rel=0.01)


def test_scaled_widths_are_one_factor_and_flat_ones_are_equal(unet):
    _, graph = unet
    full = np.array([len(group.channels) for group in graph.groups])
    one_factor = np.array(list(scaled(graph, 0.2).values()))
    assert np.abs(one_factor - full * (one_factor.sum() / full.sum())).max() < 1.01
    equal = np.array(list(flat(graph, 0.1).values()))
    assert equal.max() - equal.min() <= 1


def test_widths_that_cannot_meet_the_macs_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    graph = sparsekern.trace(model, EXAMPLE)
    with pytest.raises(ValueError, match="keep: got 0.1, whose nearest widths have .* of the MACs asked for"):
        scaled(graph, 0.1)


def test_new_weights_are_drawn_as_the_network_draws_its_own():
    torch.manual_seed(3)
    model = UNet(3, 1, width=4, depth=2)
    graph = sparsekern.trace(model, EXAMPLE)
    full = {group.name: len(group.channels) for group in graph.groups}
    again = rebuilt(model, graph, full, seed=3)
    other = rebuilt(model, graph, full, seed=4)
    for (name, weight), same, different in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        if weight.dim() < 2:
            assert torch.equal(weight, same) or name.endswith("bias")
            continue
        # Not the same numbers: torch's own are drawn one after the other, and then these. But as large.
        assert same.std().item() == pytest.approx(weight.std().item(), rel=0.35), name
        assert not torch.equal(same, different)
    repeated = rebuilt(model, graph, full, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), repeated.parameters(), strict=True))


def test_the_macs_of_whole_widths_are_those_of_the_graph(unet):
    model, graph = unet
    assert macs(graph, np.array([len(g.channels) for g in graph.groups])) == counted(model, EXAMPLE)
