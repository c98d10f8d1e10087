"""Updating size attributes of modules, such as ``in_channels``, after their tensors were cut."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsekern.compact.plan import TensorPlan
from sparsekern.graph.counts import counts, set_number
from sparsekern.graph.epsilons import set_floats
from sparsekern.graph.layers import sizes
from sparsekern.nn import MultiheadAttention, NormAct2d


def update_attributes(model: nn.Module, copy: nn.Module, parts: Mapping[int, TensorPlan]) -> None:
    """Set ``in_channels`` and similar attributes on the modules of ``copy`` whose tensors were cut.

    A user's own class keeps its attributes, except for those that the plan names.

    Args:
        model: the model before the cut.
        copy: the cut model with the same module structure; may be ``model`` itself.
        parts: the part of each tensor of ``model`` that stays, by the tensor's ``id``.

    Raises:
        ValueError: the sizes of a torch class are not known.
    """
    # Counts are checked against the sizes before the cut, which a subclass of a torch layer holds itself.
    counted = counts(copy, parts.values())
    for (name, before), (_, after) in zip(model.named_modules(), copy.named_modules(), strict=True):
        changed = sizes(name, before, parts)
        if changed and isinstance(after, nn.MultiheadAttention):
            MultiheadAttention.adopt(after)
        if isinstance(after, NormAct2d):
            # Mask and counts refer to the channels before the cut; the training sets them anew.
            after.mask = after.counts = None
        for attribute, size in changed.items():
            setattr(after, attribute, size)
    for module, attribute, size in counted:
        set_number(module, attribute, size)
    set_floats(copy, parts.values())
    for encoder in copy.modules():
        # Nested tensors work only with torch's own attention.
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(module, MultiheadAttention) for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False
