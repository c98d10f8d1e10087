"""Which ops have a rule, and that numbers of heads follow through plans, files and shrinking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graph.attention_structures import Fused
from torch import Tensor, nn

from sparsekern.compact import Plan, compact, load, make_plan, plan_of, save, verify
from sparsekern.graph import trace
from sparsekern.graph.propagate.interpret import _rule

# Overloads of image networks, without those whose freezing is tested by their own structure.
FOLLOWED = """
conv2d batch_norm flatten.using_ints linear relu_ adaptive_avg_pool2d dropout add.Tensor cat add_.Tensor
max_pool2d mul.Tensor view transpose.int layer_norm gelu reshape mean.dim permute relu sigmoid softmax.int
avg_pool2d upsample_bilinear2d.vec contiguous matmul upsample_nearest2d.vec hardswish_ hardsigmoid
index.Tensor unsqueeze conv_transpose2d.input div.Tensor dropout_ chunk pad select.int slice.Tensor
scaled_dot_product_attention unbind.int silu_ sub.Tensor leaky_relu_ group_norm stack sum.dim_IntList
prelu instance_norm split.Tensor linalg_vector_norm hardtanh_ roll expand silu einsum alias reshape_as
to.dtype clamp_min expand_as split_with_sizes new_zeros lift_fresh_copy fill_.Tensor ne.Scalar eq.Scalar
masked_fill.Scalar unflatten.int squeeze.dim swapaxes tanh feature_dropout feature_dropout_
empty.memory_format
conv3d conv_transpose3d.input mul_.Tensor zeros to.device bitwise_not cumsum arange div.Tensor_mode
pow.Scalar sin cos addcmul clamp exp hardswish bernoulli_.float div_.Tensor new_empty amax bmm
channel_shuffle clone flip im2col mv pixel_shuffle pixel_unshuffle repeat repeat_interleave.self_int
rms_norm sort vdot ones pow.Tensor_Scalar detach_ avg_pool3d gru.input lstm.input
glu _weight_norm _assert_tensor_metadata
"""


@pytest.mark.parametrize("name", FOLLOWED.split())
def test_has_a_rule(name: str) -> None:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    assert _rule(op)[2].function.__name__ != "_no_rule"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(3, 16), Fused(), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.stem(x)))


X = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))


def test_numbers_of_heads_follow(tmp_path: Path) -> None:
    """After one cut and two, through JSON and through a file."""
    torch.manual_seed(0)
    model = Net()
    graph = trace(model, X)
    (heads,) = (g for g in graph.groups if g.name == "attention.qkv")
    assert len(heads.channels) == 4
    kept = np.ones(graph.num_channels, bool)
    kept[heads.channels[1]] = False
    plan = make_plan(graph, kept)
    assert Plan.from_json(plan.to_json()) == plan
    small = compact(model, plan)
    assert (small.attention.num_heads, small.attention.inner, small.attention.head_dim) == (3, 12, 4)
    assert (model.attention.num_heads, model.attention.inner) == (4, 16)

    again = trace(small, X)
    kept = np.ones(again.num_channels, bool)
    kept[next(g for g in again.groups if g.name == "attention.qkv").channels[:2]] = False
    smaller = compact(small, make_plan(again, kept))
    assert (smaller.attention.num_heads, smaller.attention.inner) == (1, 4)
    save(smaller, tmp_path / "net.safetensors")
    loaded = load(Net(), tmp_path / "net.safetensors")
    assert loaded.attention.num_heads == 1
    assert verify(smaller, loaded, X) == 0

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = small

    assert plan_of(Outer()).tensors["inside.attention.qkv.weight"].sizes == {
        "inside.attention.num_heads": (0, 12),
        "inside.attention.inner": (0, 3),
    }


def test_a_plan_of_numbers_that_the_model_lacks_is_refused() -> None:
    model = Net()
    graph = trace(model, X)
    kept = np.ones(graph.num_channels, bool)
    kept[next(g for g in graph.groups if g.name == "attention.qkv").channels[0]] = False
    del model.attention.num_heads
    with pytest.raises(ValueError, match="'attention.num_heads' is no number in this one"):
        compact(model, make_plan(graph, kept))
