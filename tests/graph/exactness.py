"""The check of a graph: masked and compacted networks are compared in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sparsekern._copying import copied
from sparsekern.compact import compact, make_plan
from sparsekern.graph import ChannelGraph, trace


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with all parameters and statistics away from their initial values.

    Dropout is switched off, so that training mode repeats.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Also the scales and heads that some networks start at (nearly) zero.
            if parameter.ndim <= 1 or parameter.abs().max() < 1e-3:
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(torch.where(noise > 0.7, -0.5 - noise, 0.5 + noise))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name.endswith(("running_mean", "running_var")):
                noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(noise + 0.5 if name.endswith("var") else noise - 0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model


def choose(graph: ChannelGraph, seed: int, share: float = 0.5) -> np.ndarray:
    """Keep a random share of every group, at least one channel; bool [C]."""
    generator = np.random.default_rng(seed)
    kept = np.zeros(graph.num_channels, bool)
    for group in graph.groups:
        count = max(1, round(len(group.channels) * share * generator.uniform(0.6, 1.4)))
        kept[generator.permutation(group.channels)[: min(count, len(group.channels))]] = True
    return kept


def mask(model: nn.Module, graph: ChannelGraph, kept: np.ndarray) -> nn.Module:
    """A copy with the rows of all channels that are not kept at zero, and with their masked columns."""
    masked = copied(model)
    tensors = dict(masked.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, slots in graph.tensors.items():
            if slots.kind != "parameter" or slots.row_dim is None:
                continue
            channels = slots.channels[slots.row_dim]
            if channels is not None:
                gone = np.flatnonzero((channels >= 0) & ~kept[channels])
                tensors[name].index_fill_(slots.row_dim, torch.from_numpy(gone), 0.0)
        for name, dim in {column for group in graph.groups for column in group.masked_columns}:
            channels = graph.tensors[name].channels[dim]
            gone = np.flatnonzero((channels >= 0) & ~kept[channels])
            tensors[name].index_fill_(dim, torch.from_numpy(gone), 0.0)
    return masked


def difference(masked: nn.Module, small: nn.Module, inputs: Sequence[Any]) -> float:
    """Largest difference of any output over the largest output, in both modes."""
    worst = 0.0
    for training in (False, True):
        outputs = []
        for model in (masked, small):
            torch.manual_seed(0)
            with torch.no_grad():
                leaves = pytree.tree_leaves(model.train(training)(*inputs))
                outputs.append([torch.as_tensor(leaf) for leaf in leaves])
        for left, right in zip(*outputs, strict=True):
            assert left.shape == right.shape
            assert left.isfinite().all()
            scale = max(float(left.abs().max()), 1e-300)
            worst = max(worst, float((left - right).abs().max()) / scale)
    return worst


def flops(model: nn.Module, inputs: Sequence[Any]) -> int:
    """Half of what torch's counter finds in evaluation mode.

    The counter knows the two products of attention only as separate ops, not in fused kernels for the
    CPU; with gradients enabled, ``nn.MultiheadAttention`` does not take its fast path.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // 2


def check(
    model: nn.Module, inputs: Sequence[Any], *, seed: int = 0, share: float = 0.5, bound: float = 1e-12
) -> ChannelGraph:
    """Trace, remove channels at random, compare outputs and costs; returns the graph."""
    model = randomise(model, seed)
    inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    graph = trace(model, tuple(inputs))
    kept = choose(graph, seed, share)
    small, masked = compact(model, make_plan(graph, kept)), mask(model, graph, kept)
    assert difference(masked, small, inputs) < bound
    # The masked channels reach the output; otherwise the comparison would prove nothing.
    assert kept.all() or difference(masked, model, inputs) > 1e-9
    cost = graph.cost(kept)
    assert cost.params == sum(p.numel() for p in small.parameters())
    assert cost.macs == flops(small, inputs)
    return graph
