"""Bringing the sizes that modules keep in line with their tensors after surgery."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsekern.compact.plan import TensorPlan
from sparsekern.graph.layers import counts, sizes
from sparsekern.nn import MultiheadAttention, NormAct2d


def update_attributes(model: nn.Module, copy: nn.Module, parts: Mapping[int, TensorPlan]) -> None:
    """Sets ``in_channels`` and the like on the modules of ``copy`` whose tensors were cut.

    ``parts`` gives, by ``id`` of a tensor of ``model``, what stays of it. A class of torch
    whose sizes are not understood raises ``ValueError``; a user's own class keeps its
    attributes, but for those that the plan names.
    """
    for (name, before), (_, after) in zip(model.named_modules(), copy.named_modules(), strict=True):
        changed = sizes(name, before, parts)
        if changed and isinstance(after, nn.MultiheadAttention):
            MultiheadAttention.adopt(after)
        if isinstance(after, NormAct2d):
            # Of the channels that were, and of the training that set them.
            after.mask = after.counts = None
        for attribute, size in changed.items():
            setattr(after, attribute, size)
    for module, attribute, size in counts(copy, parts.values()):
        vars(module)[attribute] = size
    for encoder in copy.modules():
        # Its nested tensors are for torch's own attention only.
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(module, MultiheadAttention) for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False
