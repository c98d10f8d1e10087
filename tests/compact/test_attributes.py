from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from compact.networks import NORM, plan_for, sizes
from torch import nn

from sparsekern.compact import compact


def one(module: nn.Module, keep: Mapping[str, Mapping[int, Sequence[int]]]) -> nn.Module:
    small = compact(module, plan_for(module, keep))
    for name, part in plan_for(module, keep).tensors.items():
        assert tuple(small.state_dict()[name].shape) == part.new_shape
    return small


EVERY_NORM = {name: {0: [0, 1, 4, 5]} for name in NORM}
ROWS = {"weight": {0: [0, 1, 4, 5]}, "bias": {0: [0, 1, 4, 5]}}

# Module, the kept indices of its tensors, an input for the smaller module, its sizes.
LAYERS: dict[str, tuple[nn.Module, Any, tuple[int, ...], dict[str, Any]]] = {
    "conv": (
        nn.Conv2d(6, 8, 3),
        {**ROWS, "weight": {0: [0, 1, 4, 5], 1: [2]}},
        (1, 1, 5, 5),
        {"in_channels": 1, "out_channels": 4, "groups": 1},
    ),
    "conv1d": (
        nn.Conv1d(6, 8, 3, bias=False),
        {"weight": {1: [0, 3, 5]}},
        (1, 3, 5),
        {"in_channels": 3, "out_channels": 8, "groups": 1},
    ),
    "conv3d transposed": (
        nn.ConvTranspose3d(6, 8, 3),
        {"weight": {0: [0, 5], 1: [1, 2, 3]}, "bias": {0: [1, 2, 3]}},
        (1, 2, 3, 3, 3),
        {"in_channels": 2, "out_channels": 3, "groups": 1},
    ),
    "depthwise": (
        nn.Conv2d(8, 8, 3, groups=8),
        ROWS,
        (1, 4, 5, 5),
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "depthwise, two outputs each": (
        nn.Conv2d(4, 8, 3, groups=4),
        ROWS,
        (1, 2, 5, 5),
        {"in_channels": 2, "out_channels": 4, "groups": 2},
    ),
    "depthwise, one left": (
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        {"weight": {0: [6]}},
        (1, 1, 5, 5),
        {"in_channels": 1, "out_channels": 1, "groups": 1},
    ),
    "depthwise transposed": (
        nn.ConvTranspose2d(8, 8, 3, groups=8),
        ROWS,
        (1, 4, 5, 5),
        {"in_channels": 4, "out_channels": 4, "groups": 4},
    ),
    "grouped": (
        nn.Conv2d(8, 8, 3, groups=2),
        {
            **ROWS,
            "weight": {
                0: [0, 1, 4, 5],
                1: [
                    0,
                    3,
                ],
            },
        },
        (1, 4, 5, 5),
        {"in_channels": 4, "out_channels": 4, "groups": 2},
    ),
    "grouped transposed": (
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        {"weight": {0: [0, 1, 4, 5], 1: [1, 2, 3]}, "bias": {0: [1, 2, 3, 5, 6, 7]}},
        (1, 4, 5, 5),
        {"in_channels": 4, "out_channels": 6, "groups": 2},
    ),
    "linear": (
        nn.Linear(6, 8),
        {**ROWS, "weight": {0: [0, 1, 4, 5], 1: [0, 1, 2]}},
        (2, 3),
        {"in_features": 3, "out_features": 4},
    ),
    "batch norm": (nn.BatchNorm2d(8), EVERY_NORM, (2, 4, 3, 3), {"num_features": 4}),
    "batch norm without affine": (
        nn.BatchNorm1d(8, affine=False),
        {name: EVERY_NORM[name] for name in NORM[2:]},
        (2, 4),
        {"num_features": 4},
    ),
    "batch norm without statistics": (
        nn.BatchNorm2d(8, track_running_stats=False),
        ROWS,
        (2, 4, 3, 3),
        {"num_features": 4},
    ),
    "instance norm": (
        nn.InstanceNorm2d(8, affine=True),
        ROWS,
        (2, 4, 3, 3),
        {"num_features": 4},
    ),
    "group norm, whole groups": (
        nn.GroupNorm(4, 8),
        ROWS,
        (2, 4, 3, 3),
        {"num_channels": 4, "num_groups": 2},
    ),
    "group norm, part of each": (
        nn.GroupNorm(2, 8),
        ROWS,
        (2, 4, 3, 3),
        {"num_channels": 4, "num_groups": 2},
    ),
    "layer norm": (nn.LayerNorm(8), ROWS, (2, 4), {"normalized_shape": (4,)}),
    "rms norm": (nn.RMSNorm(8), {"weight": {0: [1]}}, (2, 1), {"normalized_shape": (1,)}),
    "prelu": (nn.PReLU(8), {"weight": {0: [1, 2]}}, (2, 2, 3), {"num_parameters": 2}),
    "embedding": (nn.Embedding(9, 8), {"weight": {1: [1, 2]}}, (2,), {"embedding_dim": 2}),
}


@pytest.mark.parametrize(("module", "keep", "shape", "expected"), LAYERS.values(), ids=LAYERS)
def test_sizes_follow_the_tensors(
    module: nn.Module, keep: Any, shape: tuple[int, ...], expected: dict[str, Any]
) -> None:
    small = one(module, keep)
    assert sizes(small) == expected
    data = torch.zeros(shape, dtype=torch.long if isinstance(module, nn.Embedding) else None)
    small(data)


IMPOSSIBLE: dict[str, tuple[nn.Module, Any, str]] = {
    "unequal groups": (
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        {"weight": {0: [0, 4, 5]}},
        r"the 2 groups of '' keep \[1, 2\] channels",
    ),
    "unequal norm groups": (nn.GroupNorm(2, 8), {k: {0: [0, 1, 4]} for k in ROWS}, r"\[2, 1\]"),
    "whole bias": (nn.Conv2d(3, 8, 3), {"weight": {0: [1]}}, r"bias keeps 8 of 8, expected 1"),
    "whole variance": (
        nn.BatchNorm2d(8),
        {name: EVERY_NORM[name] for name in NORM[:3]},
        r"running_var keeps 8 of 8, expected 4",
    ),
    "half a layer norm": (nn.LayerNorm(8), {"bias": {0: [1]}}, "different shapes"),
    "vocabulary": (nn.Embedding(9, 8), {"weight": {0: [1, 2]}}, "vocabulary"),
    "recurrent": (
        nn.LSTM(4, 4, proj_size=2),
        {"weight_ih_l0": {1: [0]}},
        "cuts weight_ih_l0 of '', a LSTM",
    ),
    "attention": (
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
        {"in_proj_weight": {1: [0]}},
        "in_proj_weight",
    ),
}


@pytest.mark.parametrize(("module", "keep", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_a_layer_cannot_be_is_refused(module: nn.Module, keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compact(module, plan_for(module, keep))
