"""Masked against compact output in float64, for whole networks at several budgets.

``python -m benchmarks.exactness`` prints, per network and share of MACs, the largest difference over the
largest output. The channels to remove are random, since exactness must not depend on the choice. All layers
keep the same share, so that a signal still reaches the output; its spread is printed too.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.environment import environment
from benchmarks.networks import NETWORKS, example, randomise
from sparsekern import compact, trace, verify
from sparsekern.compact import make_plan
from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.allocate import Problem, Uniform
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.statistics import ChannelRows

KEEPS = (0.5, 0.2, 0.05)
CASES = (
    "unet-2m",
    "unet-2m-bilinear",
    "mobilenetv3-seg",
    "resnet18",
    "resnet50",
    "densenet121",
    "vgg16_bn",
)


def mask(model: nn.Module, graph: ChannelGraph, kept: np.ndarray) -> None:
    """Zero the rows of all channels that are not ``kept``, as training with a Pruner leaves them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = ChannelRows(model, graph, {id(p) for p in parameters.values()}, decay=0.9)
    Masks(graph, rows, parameters, lambda _: ()).mask(~kept)


@torch.no_grad()
def measure(name: str, keep: float) -> tuple[float, float, float, float]:
    """Largest relative difference, spread of the output, share of MACs and of parameters of one case."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    randomise(model)
    inputs = example(name, dtype=torch.float64)
    graph = trace(model, inputs)
    everything = np.ones(graph.num_channels, bool)
    dense = graph.cost(everything)
    problem = Problem(
        graph=graph,
        saliency=np.random.default_rng(0).random(graph.num_channels),
        live=everything,
        budget=keep * dense.macs,
        of="macs",
        floors=np.ones(len(graph.groups), np.int64),
    )
    kept = Uniform()(problem)
    mask(model, graph, kept)
    small = compact(model, make_plan(graph, kept))
    cost = graph.cost(kept)
    output = model(inputs)
    output = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
    spread = float(output.std() / output.abs().max())
    return verify(model, small, inputs), spread, cost.macs / dense.macs, cost.params / dense.params


def main() -> None:
    """Print the table of all cases."""
    table = Table("network", "keep", "MACs", "parameters", "largest difference", "spread of the output")
    for name in CASES:
        for keep in KEEPS:
            error, spread, macs, params = measure(name, keep)
            row = [f"{keep}", f"{macs:.3f}", f"{params:.3f}", f"{error:.1e}", f"{spread:.2f}"]
            table.add_row(name, *row)
    console = Console()
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    main()
