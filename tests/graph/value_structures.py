"""Structures that change values: scales, shifts, norms, gates, products, and what is left of zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph.structures import Piece, conv, structure
from torch import Tensor, nn


@structure(16, scale=lambda: torch.rand(16, 1, 1))
def scaled_by_a_buffer(net: Piece, x: Tensor) -> Tensor:
    return x * net.scale


@structure(16, shift=lambda: torch.rand(16, 1, 1))
def shifted_by_a_buffer(net: Piece, x: Tensor) -> Tensor:
    return x + net.shift


@structure(
    16,
    scale=lambda: nn.Parameter(torch.rand(1, 16, 1, 1)),
    shift=lambda: nn.Parameter(torch.rand(1, 16, 1, 1)),
)
def affine_of_parameters(net: Piece, x: Tensor) -> Tensor:
    return x * net.scale + net.shift


@structure(16, position=lambda: nn.Parameter(torch.rand(1, 16, 8, 8)))
def position_embedding(net: Piece, x: Tensor) -> Tensor:
    return x + net.position


@structure(16)
def shifted_by_a_number(net: Piece, x: Tensor) -> Tensor:
    return x + 0.5


@structure(16)
def scaled_and_clamped(net: Piece, x: Tensor) -> Tensor:
    return (x * 3 / 2).clamp(-1, 2) - 0 + x.clamp_min(0)


@structure(16)
def clamped_away_from_zero(net: Piece, x: Tensor) -> Tensor:
    return x.clamp(0.1, 2)


@structure(16)
def sigmoid(net: Piece, x: Tensor) -> Tensor:
    return x.sigmoid()


@structure(0)
def sigmoid_in_place_through_a_view(net: Piece, x: Tensor) -> Tensor:
    y = (x * 1).contiguous()
    y.view(2, -1).sigmoid_()
    return y


@structure(0)
def divided_by_the_number_of_channels(net: Piece, x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True) / x.shape[1] + x


@structure(0)
def scaled_by_a_tensor_of_the_number_of_channels(net: Piece, x: Tensor) -> Tensor:
    return x * torch.tensor(x.shape[1]).to(x.dtype).sqrt()


@structure(0, conv=conv(16, 16, 3))
def other_path_for_other_widths(net: Piece, x: Tensor) -> Tensor:
    y = net.conv(x)
    return x + y if x.shape[1] == 16 else x


@structure(14, anywhere=False)
def squeezed_without_a_dimension(net: Piece, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).squeeze()[:, :, None, None]


@structure(16)
def mish_from_parts(net: Piece, x: Tensor) -> Tensor:
    return x * F.softplus(x).tanh()


@structure(16)
def divided_by_one_and_more(net: Piece, x: Tensor) -> Tensor:
    return x / (x.abs() + 1)


@structure(0, anywhere=False)
def quotient_of_zeros(net: Piece, x: Tensor) -> Tensor:
    return (x + 1e-3) / x.exp().sub(1).add(1e-9).abs()


@structure(16)
def normalised_over_channels(net: Piece, x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


@structure(0, ln=lambda: nn.LayerNorm(16))
def layer_norm(net: Piece, x: Tensor) -> Tensor:
    return net.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@structure(4, gn=lambda: nn.GroupNorm(4, 16))
def group_norm(net: Piece, x: Tensor) -> Tensor:
    return net.gn(x)


@structure(0, gn=lambda: nn.GroupNorm(1, 16))
def group_norm_of_one_group(net: Piece, x: Tensor) -> Tensor:
    return net.gn(x)


@structure(16, norm2=lambda: nn.InstanceNorm2d(16, affine=True))
def instance_norm(net: Piece, x: Tensor) -> Tensor:
    return net.norm2(x)


@structure(16, norm2=lambda: nn.InstanceNorm2d(16))
def instance_norm_without_affine(net: Piece, x: Tensor) -> Tensor:
    return net.norm2(x)


@structure(16, norm2=lambda: nn.BatchNorm2d(16, affine=False))
def batch_norm_without_affine(net: Piece, x: Tensor) -> Tensor:
    return net.norm2(x)


@structure(0, lrn=lambda: nn.LocalResponseNorm(3))
def local_response_norm(net: Piece, x: Tensor) -> Tensor:
    return net.lrn(x)


@structure(16, act=lambda: nn.PReLU(16))
def prelu_per_channel(net: Piece, x: Tensor) -> Tensor:
    return net.act(x)


@structure(16, act=lambda: nn.PReLU())
def prelu_of_one_slope(net: Piece, x: Tensor) -> Tensor:
    return net.act(x)


@structure(16 + 4, down=conv(16, 4), up=conv(4, 16))
def squeeze_and_excitation(net: Piece, x: Tensor) -> Tensor:
    return x * net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))).sigmoid()


@structure(16 + 4, down=lambda: nn.Linear(16, 4), up=lambda: nn.Linear(4, 16))
def squeeze_by_linear(net: Piece, x: Tensor) -> Tensor:
    n, c, _, _ = x.shape
    gate = net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1).view(n, c))))
    return x * gate.sigmoid().view(n, c, 1, 1).expand_as(x)


@structure(16 + 16, out=32, conv=conv(16, 16, 3))
def concatenation(net: Piece, x: Tensor) -> Tensor:
    return torch.cat([x, net.conv(x)], 1)


@structure(16 + 8, conv=conv(16, 8, 3), back=conv(24, 16))
def concatenation_under_a_residual(net: Piece, x: Tensor) -> Tensor:
    return x + net.back(torch.cat([x, net.conv(x)], 1))


@structure(16 + 12, conv=conv(12, 12, 3), reduce=conv(16, 12), out=16)
def padded_shortcut(net: Piece, x: Tensor) -> Tensor:
    return F.pad(net.reduce(x), (0, 0, 0, 0, 2, 2))


@structure(16 + 32, out=32, fc=lambda: nn.Linear(16 * 16, 32), anywhere=False)
def flattened_positions(net: Piece, x: Tensor) -> Tensor:
    return net.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))[:, :, None, None]


@structure(16 + 24, one=lambda: nn.Linear(16, 24), two=lambda: nn.Linear(24, 16))
def mlp_over_channels_last(net: Piece, x: Tensor) -> Tensor:
    y = net.two(F.gelu(net.one(x.permute(0, 2, 3, 1))))
    return x + y.permute(0, 3, 1, 2)


@structure(0, mix=lambda: nn.Linear(64, 64))
def mixer_over_positions(net: Piece, x: Tensor) -> Tensor:
    return net.mix(x.flatten(2)).view_as(x)


@structure(0, qkv=lambda: nn.Linear(16, 48), proj=lambda: nn.Linear(16, 16))
def fused_attention(net: Piece, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    q, k, v = net.qkv(x.flatten(2).transpose(1, 2)).reshape(n, h * w, 3, 2, 8).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)
    return net.proj(y.transpose(1, 2).reshape(n, h * w, c)).transpose(1, 2).reshape(n, c, h, w)


@structure(16 + 16, weight=lambda: nn.Parameter(torch.randn(16, 16)))
def product_with_a_parameter(net: Piece, x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) @ net.weight).permute(0, 3, 1, 2)


@structure(16 + 16, weight=lambda: nn.Parameter(torch.randn(16, 16)))
def einsum_with_a_parameter(net: Piece, x: Tensor) -> Tensor:
    return torch.einsum("nchw,dc->ndhw", x, net.weight)


@structure(16 + 16, weight=lambda: nn.Parameter(torch.randn(16, 16, 3, 3)))
def functional_convolution(net: Piece, x: Tensor) -> Tensor:
    return F.conv2d(x, net.weight, padding=1)


@structure(0, maker=lambda: nn.Linear(16, 16 * 16))
def weights_from_activations(net: Piece, x: Tensor) -> Tensor:
    weight = net.maker(x.mean((0, 2, 3))).view(16, 16, 1, 1)
    return F.conv2d(x, weight)


@structure(16)
def masked_and_selected(net: Piece, x: Tensor) -> Tensor:
    return torch.where(x > 0.1, x, torch.zeros_like(x)).masked_fill(x < 0.2, 0.0)


@structure(0, anywhere=False)
def sorted_channels(net: Piece, x: Tensor) -> Tensor:
    return x.sort(1).values


@structure(0)
def written_into_a_new_tensor(net: Piece, x: Tensor) -> Tensor:
    y = torch.zeros(2, 16, 8, 8, dtype=x.dtype)
    y[:, :8] = x[:, 8:]
    y[:, 8:] = x[:, :8]
    return y


@structure(16, out=64)
def focus(net: Piece, x: Tensor) -> Tensor:
    parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.cat(parts, 1)


@structure(16, out=16 * 9)
def unfold(net: Piece, x: Tensor) -> Tensor:
    return F.unfold(x, 3, padding=1).unflatten(2, (8, 8))


@structure(16, anywhere=False)
def resized_and_pooled(net: Piece, x: Tensor) -> Tensor:
    y = F.interpolate(F.max_pool2d(x, 3, 2, 1), scale_factor=2, mode="bilinear")
    return F.pad(y, (1, 1, 1, 1), mode="reflect") + F.pad(F.interpolate(x, size=(10, 10)), (0, 0, 0, 0))


@structure(0)
def cumulative_over_channels(net: Piece, x: Tensor) -> Tensor:
    return x.cumsum(1)


@structure(16)
def autocast_region(net: Piece, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.silu(x)


@structure(16)
def region_without_gradient(net: Piece, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.hardswish(x)
    return x + y


@structure(16 + 16, conv=conv(16, 16, 3))
def weight_standardised_by_a_buffer(net: Piece, x: Tensor) -> Tensor:
    return F.conv2d(x, net.conv.weight * 0.5, net.conv.bias, padding=1)


@structure(16)
def batch_and_channels_merged(net: Piece, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(1, n * c, h, w).view(n, c, h, w) + x.reshape(n * c, 1, h, w).view(n, c, h, w)
