"""Networks that are smaller from the start: which channels they have, and new weights for them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from sparsekern.compact import compact, make_plan
from sparsekern.graph import ChannelGraph

TOLERANCE = 0.01  # of the MACs asked for


def scaled(graph: ChannelGraph, keep: float) -> dict[str, int]:
    """Widths of all groups, scaled by one factor, whose MACs are `keep` of the dense ones.

    Widths are whole numbers, so one factor alone does not meet the MACs: single channels are added where
    rounding took most, until the MACs are within `TOLERANCE`.

    Raises:
        ValueError: no widths come so near.
    """
    full = np.array([len(group.channels) for group in graph.groups])
    return _matched(graph, keep, full.astype(float))


def flat(graph: ChannelGraph, keep: float) -> dict[str, int]:
    """Widths of all groups, equal where the groups are wide enough, whose MACs are `keep` of the dense ones.

    Raises:
        ValueError: no widths come so near.
    """
    full = np.array([len(group.channels) for group in graph.groups])
    return _matched(graph, keep, np.full(len(full), float(full.max())))


def _matched(graph: ChannelGraph, keep: float, shape: np.ndarray) -> dict[str, int]:
    full = np.array([len(group.channels) for group in graph.groups])
    budget = keep * macs(graph, full)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if macs(graph, _rounded_down(middle * shape, full)) <= budget:
            low = middle
        else:
            high = middle
    widths = _rounded_down(low * shape, full)
    # The largest remainders first (the largest remainder method).
    for group in np.argsort(widths - low * shape, kind="stable"):
        more = widths.copy()
        more[group] = min(more[group] + 1, full[group])
        if (
            macs(graph, widths) < (1 - TOLERANCE / 2) * budget
            and macs(graph, more) <= (1 + TOLERANCE) * budget
        ):
            widths = more
    found = macs(graph, widths)
    if abs(found / budget - 1) > TOLERANCE:
        raise ValueError(
            f"keep: got {keep}, whose nearest widths have {found / budget:.3f} of the MACs asked for"
        )
    return {group.name: int(width) for group, width in zip(graph.groups, widths, strict=True)}


def _rounded_down(widths: np.ndarray, full: np.ndarray) -> np.ndarray:
    return np.clip(np.floor(widths), 1, full).astype(np.int64)


def first_channels(graph: ChannelGraph, widths: np.ndarray) -> np.ndarray:
    """bool `[C]`: the first channels of each group, as many as `widths` `[groups]` says."""
    kept = np.zeros(graph.num_channels, bool)
    for group, width in zip(graph.groups, widths, strict=True):
        kept[group.channels[:width]] = True
    return kept


def macs(graph: ChannelGraph, widths: np.ndarray) -> int:
    return graph.cost(first_channels(graph, widths)).macs


def rebuilt(model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int], seed: int) -> nn.Module:
    """A network like `model` with `widths` by group name and new weights, drawn as `model` draws its own."""
    kept = first_channels(graph, np.array([widths[group.name] for group in graph.groups]))
    small = compact(model, make_plan(graph, kept))
    torch.manual_seed(seed)
    for module in small.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    # Networks with their own initialisation of some weights apply it after torch's.
    for module in small.modules():
        if hasattr(module, "_initialise"):
            module._initialise()
    return small
