"""The scale of a filter before a batch norm has no effect, so no decision may depend on it."""

from __future__ import annotations

import numpy as np
import torch
from prune.networks import Plain, batch
from torch import nn

import sparsekern
from sparsekern import Pruner
from sparsekern.prune.state.statistics import Statistics, gather

STEPS = 12


def watched(scales: torch.Tensor | None) -> tuple[Pruner, Statistics]:
    """The network with and without rescaled filters; fixed weights, statistics of the same batches."""
    torch.manual_seed(0)
    model = Plain().double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            # A larger epsilon would make the function itself depend on the scale.
            norm.eps = 1e-30
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    if scales is not None:
        with torch.no_grad():
            model.stem[0].weight.mul_(scales[:16, None, None, None])
            model.body[0].weight.mul_(scales[:, None, None, None])
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=1e-300)
    example = batch(0, dtype=torch.float64)
    pruner = Pruner(model, optimizer, example, keep=0.4, steps=100, warmup=0.5, finish=0.9)
    for step in range(STEPS):
        model(batch(step, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    everything = np.ones(pruner.graph.num_channels, bool)
    return pruner, gather(pruner._network.rows, pruner.graph, everything, dict(model.named_parameters()))


def test_counts_ranking_and_plan_do_not_depend_on_the_scale_of_filters() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = 2.0 ** torch.randint(-4, 5, (32,), generator=generator).double()
    pruner, plain = watched(None)
    rescaled_pruner, rescaled = watched(scales)
    assert plain.activity.max() > 0
    np.testing.assert_array_equal(rescaled.activity, plain.activity)
    criterion = sparsekern.criteria.default()
    order, rescaled_order = (np.argsort(criterion(s), kind="stable") for s in (plain, rescaled))
    np.testing.assert_array_equal(rescaled_order, order)
    assert rescaled_pruner.plan(keep=0.4) == pruner.plan(keep=0.4)


def test_the_norm_of_a_filter_does_depend_on_it() -> None:
    """The control: the same comparison detects a criterion that is not scale-free."""
    scales = 2.0 ** torch.arange(-16, 16).clamp(-4, 4).double()
    _, plain = watched(None)
    _, rescaled = watched(scales)
    magnitude = sparsekern.criteria.Magnitude()
    assert (np.argsort(magnitude(plain)) != np.argsort(magnitude(rescaled))).any()
