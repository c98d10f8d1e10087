"""Structures that move channels about, cut them, join them, or tie them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph.structures import Piece, conv, structure
from torch import Tensor, nn


@structure(16)
def plain(net: Piece, x: Tensor) -> Tensor:
    return x


@structure(16)
def flip_channels(net: Piece, x: Tensor) -> Tensor:
    return x.flip(1)


@structure(0)
def roll_channels(net: Piece, x: Tensor) -> Tensor:
    return x.roll(3, 1)


@structure(16)
def roll_space(net: Piece, x: Tensor) -> Tensor:
    return x.roll((1, 2), (2, 3))


@structure(4)
def channel_shuffle_module(net: Piece, x: Tensor) -> Tensor:
    return F.channel_shuffle(x, 4)


@structure(4)
def channel_shuffle_views(net: Piece, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


@structure(4)
def blocks_of_fixed_size(net: Piece, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, c // 4, 4, h, w).flip(2).reshape(n, c, h, w)


@structure(4)
def blocks_of_inferred_number(net: Piece, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return x.view(n, -1, 4, h, w).flip(2).reshape(n, -1, h, w)


@structure(0, anywhere=False)
def written_out_beside_inferred(net: Piece, x: Tensor) -> Tensor:
    return x.view(x.shape[0], 16, -1).mean(2)[:, :, None, None]


@structure(16, out=32)
def stack_and_flatten(net: Piece, x: Tensor) -> Tensor:
    return torch.stack([x, x * 2], 2).flatten(1, 2)


@structure(16, conv=conv(16, 16, 3))
def applied_twice(net: Piece, x: Tensor) -> Tensor:
    return net.conv(F.relu(net.conv(x)))


@structure(0)
def softmax_over_channels(net: Piece, x: Tensor) -> Tensor:
    return x.softmax(1)


@structure(16)
def softmax_over_space(net: Piece, x: Tensor) -> Tensor:
    return x.flatten(2).softmax(2).view_as(x)


@structure(0, spatial=conv(2, 1, 3))
def block_attention(net: Piece, x: Tensor) -> Tensor:
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * net.spatial(pooled).sigmoid()


@structure(16)
def sum_over_channels_gates(net: Piece, x: Tensor) -> Tensor:
    return x * x.sum(1, keepdim=True).sigmoid()


@structure(4, out=4)
def pixel_shuffle(net: Piece, x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


@structure(16, out=64)
def pixel_unshuffle(net: Piece, x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2)


@structure(8, out=8)
def gated_linear_unit(net: Piece, x: Tensor) -> Tensor:
    return F.glu(x, 1)


@structure(16, out=32, conv=conv(16, 32, 3, groups=16))
def depthwise_with_multiplier(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(16, conv=conv(16, 16, 3, groups=16), norm2=lambda: nn.BatchNorm2d(16))
def separable(net: Piece, x: Tensor) -> Tensor:
    return F.relu6(net.norm2(net.conv(x)))


@structure(4 + 6, out=24, conv=conv(16, 24, 3, groups=4))
def grouped(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(4 + 6, out=24, conv=lambda: nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4))
def grouped_transposed(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(16, conv=lambda: nn.ConvTranspose2d(16, 16, 2, stride=2, groups=16), anywhere=False)
def depthwise_transposed(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(16, out=48, conv=lambda: nn.ConvTranspose2d(16, 48, 2, stride=2, groups=16))
def depthwise_transposed_with_multiplier(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(16 + 12, out=12, conv=lambda: nn.ConvTranspose2d(16, 12, 2, stride=2))
def transposed(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(0, conv=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 1)))
def weight_norm(net: Piece, x: Tensor) -> Tensor:
    return net.conv(x)


@structure(0, rnn=lambda: nn.LSTM(16, 16, batch_first=True))
def recurrent(net: Piece, x: Tensor) -> Tensor:
    return net.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)


@structure(0, out=8)
def fixed_slice(net: Piece, x: Tensor) -> Tensor:
    return x[:, 4:12]


@structure(8, out=8)
def chunks(net: Piece, x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    return left - right


@structure(8, out=8)
def split_by_half_of_the_width(net: Piece, x: Tensor) -> Tensor:
    left, right = x.split(x.shape[1] // 2, 1)
    return left * right


@structure(0)
def split_by_number_and_swapped(net: Piece, x: Tensor) -> Tensor:
    return torch.cat(x.split(8, 1)[::-1], 1)


@structure(0)
def split_unevenly(net: Piece, x: Tensor) -> Tensor:
    left, right = x.split([4, 12], 1)
    return torch.cat([right, left], 1)


@structure(0)
def fixed_permutation(net: Piece, x: Tensor) -> Tensor:
    return x[:, torch.arange(15, -1, -1)]


@structure(0, order=lambda: torch.randperm(16))
def permutation_in_a_buffer(net: Piece, x: Tensor) -> Tensor:
    return x.index_select(1, net.order)


@structure(16, out=48)
def repeat(net: Piece, x: Tensor) -> Tensor:
    return x.repeat(1, 3, 1, 1)


@structure(16, out=32)
def repeat_interleave(net: Piece, x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)


@structure(0)
def fixed_view(net: Piece, x: Tensor) -> Tensor:
    return x.view(2, 16, 64).view(2, 16, 8, 8)


@structure(16)
def cumulative_over_space(net: Piece, x: Tensor) -> Tensor:
    return x.cumsum(2) / 8 + x.sort(3).values + x.max(3, keepdim=True).values


@structure(16)
def random_numbers_per_sample(net: Piece, x: Tensor) -> Tensor:
    return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1.0).div_(0.5)


@structure(16, out=32, anywhere=False)
def weighted_by_a_vector(net: Piece, x: Tensor) -> Tensor:
    return torch.cat([x, x * torch.mv(x.mean((2, 3)), x.mean((0, 2, 3))).view(-1, 1, 1, 1)], 1)


@structure(
    16 + 16,
    weight=lambda: nn.Parameter(torch.randn(16, 16)),
    bias=lambda: nn.Parameter(torch.randn(16)),
)
def product_and_sum_in_one(net: Piece, x: Tensor) -> Tensor:
    y = torch.addmm(net.bias, x.permute(0, 2, 3, 1).flatten(0, 2), net.weight)
    return y.view(2, 8, 8, -1).permute(0, 3, 1, 2)


@structure(16)
def einsum_of_activations(net: Piece, x: Tensor) -> Tensor:
    y = x.flatten(2)
    weights = torch.einsum("ncp,ncq->npq", y, y).softmax(-1)
    return torch.einsum("pq,...q->...p", weights[0], y).view(x.shape[0], -1, 8, 8)
