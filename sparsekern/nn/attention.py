"""Multi-head attention with removable heads, unlike ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with any number of heads of any size.

    torch requires ``num_heads * head_dim == embed_dim``. Here ``num_heads`` and ``head_dim`` are independent
    of ``embed_dim``: the input projections have ``num_heads * head_dim`` rows for each of queries, keys and
    values. Names and layout of the parameters, arguments and results equal torch's. Compaction converts
    torch's module (:meth:`adopt`) when it removes heads or input channels. The module does not use torch's
    fast path for inference and does not accept nested tensors. Unpickling it requires this package.
    """

    @staticmethod
    def fits(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
        """Whether the module is of this class, or of torch's and convertible by :meth:`adopt`.

        ``bias_k`` and ``add_zero_attn`` add a key to every head; this class does not support them.
        """
        if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
            return False
        return module.bias_k is None and module.bias_v is None and not module.add_zero_attn

    @staticmethod
    def adopt(module: nn.MultiheadAttention) -> None:
        """Convert torch's module to this class in place; its results stay the same."""
        module.__class__ = MultiheadAttention
        # With this flag False, torch's transformer layers call the module instead of a kernel that reads
        # its weights directly.
        module._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; arguments and results as in ``torch.nn.MultiheadAttention.forward``.

        Raises:
            ValueError: ``query`` is a nested tensor, or has neither 2 nor 3 dimensions.
            RuntimeError: ``is_causal`` is set without the ``attn_mask`` that it describes.
        """
        if query.is_nested:
            raise ValueError("query: got a nested tensor, expected a padded one")
        if query.ndim not in (2, 3):
            raise ValueError(f"query: got {query.ndim} dimensions, expected 2 or 3 (batched)")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal: got True without attn_mask, expected the mask that it describes")
        batched = query.ndim == 3
        q, k, v = (self._by_head(x, batched) for x in self._projected(query, key, value))
        causal = is_causal and key_padding_mask is None and not need_weights
        padding = None if key_padding_mask is None else key_padding_mask.reshape(len(q), 1, 1, -1)
        mask = _joined(None if causal else self._mask(attn_mask, len(q)), padding, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The projections of query, key and value, each ``[..., num_heads * head_dim]``."""
        inputs = (query, key, value)
        if self.in_proj_weight is None:
            kernels: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            kernels = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, kernels, biases, strict=True))

    def _by_head(self, x: Tensor, batched: bool) -> Tensor:
        """Reshape a projection, batch first, second or absent, to ``[batch, heads, positions, head_dim]``."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _mask(self, mask: Tensor | None, batch: int) -> Tensor | None:
        """Split ``[batch * heads, positions, positions]`` into batch and heads; keep 2-d masks and None."""
        if mask is None or mask.ndim == 2:
            return mask
        return mask.unflatten(0, (batch, self.num_heads))


def _joined(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The sum of both masks, to add to the scores: -inf where a bool mask is True, float masks unchanged."""
    given = [_added(m, dtype) for m in (mask, padding) if m is not None]
    return sum(given[1:], given[0]) if given else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in additive form.

    Raises:
        TypeError: the dtype is neither bool nor floating point.
    """
    if mask.is_floating_point():
        return mask
    if mask.dtype is not torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected bool or a floating point type")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
