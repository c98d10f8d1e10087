"""The outcome of one random network."""

from __future__ import annotations

import graph.random_blocks
import graph.random_steps
import graph.random_tokens  # noqa: F401
from graph.exactness import choose, difference, flops, mask, randomise
from graph.random_heads import HEADS
from graph.random_networks import Plan, build

from sparsekern.compact import compact, make_plan
from sparsekern.graph import trace

BOUND = 1e-11  # relative to the largest output; norms over few values amplify rounding errors


def examine(plan: Plan) -> tuple[str, str, int]:
    """The outcome (exact, whole, refused or DIFFERENT), a message, and the number of channels found."""
    model, inputs = build(plan, HEADS)
    model = randomise(model, plan.seed)
    inputs = tuple(x.double() for x in inputs)
    try:
        graph = trace(model, inputs)
    except ValueError as error:
        if str(error).startswith(("model: ", "example_inputs: ")):
            return "refused", str(error), 0
        raise
    kept = choose(graph, plan.seed)
    small, masked = compact(model, make_plan(graph, kept)), mask(model, graph, kept)
    cost = graph.cost(kept)
    params, macs = sum(p.numel() for p in small.parameters()), flops(small, inputs)
    if (cost.params, cost.macs) != (params, macs):
        said = f"parameters {cost.params} predicted, {params} found; MACs {cost.macs}, {macs}"
        return "DIFFERENT", said, graph.num_channels
    worst = difference(masked, small, inputs)
    if not worst < BOUND:
        return "DIFFERENT", f"outputs differ by {worst:.1e}", graph.num_channels
    return ("exact" if graph.num_channels else "whole"), "", graph.num_channels
