"""The sizes that torch's modules keep beside their tensors: brought in line after surgery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekern.compact.plan import TensorPlan

# Of a reparametrised weight (torch.nn.utils.prune, weight_norm) the module holds these instead.
_WEIGHT_NAMES = ("weight", "weight_orig", "weight_v")


@dataclass(frozen=True)
class _Layer:
    """A module of the copy whose own tensors were cut, with the part of each that stays."""

    name: str
    module: Any
    parts: Mapping[str, TensorPlan]

    def weight(self) -> TensorPlan | None:
        for name in _WEIGHT_NAMES:
            if name in self.parts:
                return self.parts[name]
        return None

    def features(self) -> TensorPlan:
        """The part of whichever one-dimensional tensor it has: they must agree."""
        return self.parts[min(self.parts)]

    def blocks(self, part: TensorPlan, count: int) -> int:
        """How many of ``count`` equal blocks of dimension 0 are left; all must stay equal."""
        if 0 not in part.keep:
            return count
        owner = part.keep[0] // (part.shape[0] // count)
        sizes = np.bincount(owner, minlength=count)
        left = sizes[sizes > 0]
        if (left != left[0]).any():
            raise ValueError(
                f"plan: the {count} groups of {self.name!r} keep {sizes.tolist()} channels, "
                "expected equal numbers"
            )
        return len(left)

    def require(self, size: int) -> None:
        """Every one-dimensional tensor of the module has ``size`` elements, or ``ValueError``."""
        for name, part in self.parts.items():
            if len(part.shape) == 1 and part.new_shape != (size,):
                raise ValueError(
                    f"plan: {self.name}.{name} keeps {part.new_shape[0]} of {part.shape[0]}, "
                    f"expected {size} to fit the other tensors of the module"
                )


def _conv(layer: _Layer, weight: TensorPlan) -> None:
    module = layer.module
    # Dimension 0 runs through the groups, dimension 1 counts positions inside one. Whole groups
    # may go (depthwise), else all of them lose the same number.
    groups = layer.blocks(weight, module.groups)
    first, second = weight.new_shape[0], weight.new_shape[1] * groups
    module.groups = groups
    module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    layer.require(module.out_channels)


def _linear(layer: _Layer, weight: TensorPlan) -> None:
    layer.module.out_features, layer.module.in_features = weight.new_shape
    layer.require(layer.module.out_features)


def _embedding(layer: _Layer, weight: TensorPlan) -> None:
    if 0 in weight.keep:
        raise ValueError(f"plan: removes entries of the vocabulary of {layer.name!r}")
    layer.module.embedding_dim = weight.new_shape[1]


def _batch_norm(layer: _Layer) -> None:
    layer.module.num_features = layer.features().new_shape[0]
    layer.require(layer.module.num_features)


def _group_norm(layer: _Layer) -> None:
    module, part = layer.module, layer.features()
    module.num_groups = layer.blocks(part, module.num_groups)
    module.num_channels = part.new_shape[0]
    layer.require(module.num_channels)


def _layer_norm(layer: _Layer) -> None:
    shape = layer.features().new_shape
    layer.module.normalized_shape = shape
    if any(part.new_shape != shape for part in layer.parts.values()):
        raise ValueError(f"plan: the tensors of {layer.name!r} keep different shapes")


def _prelu(layer: _Layer) -> None:
    layer.module.num_parameters = layer.features().new_shape[0]


_WEIGHTED: tuple[tuple[type[nn.Module], Callable[[_Layer, TensorPlan], None]], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
)
_FEATURED: tuple[tuple[type[nn.Module], Callable[[_Layer], None]], ...] = (
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.PReLU, _prelu),
)


def update_attributes(model: nn.Module, copy: nn.Module, parts: Mapping[int, TensorPlan]) -> None:
    """Sets ``in_channels`` and the like on the modules of ``copy`` whose tensors were cut.

    ``parts`` gives, by ``id`` of a tensor of ``model``, what stays of it. A class of torch
    whose sizes are not understood raises ``ValueError``; a user's own class keeps its attributes.
    """
    for (name, before), (_, after) in zip(model.named_modules(), copy.named_modules(), strict=True):
        own = _own_parts(before, parts)
        if any(part.keep for part in own.values()):
            _update(_Layer(name, after, own))
    for part in parts.values():
        _follow(copy, part)


def _follow(copy: nn.Module, part: TensorPlan) -> None:
    """Sets attributes of the user's modules that count what stays of a tensor."""
    for path, (dim, per) in part.sizes.items():
        if dim not in part.keep:
            continue
        owner, _, name = path.rpartition(".")
        attributes = copy.get_submodule(owner).__dict__
        if type(attributes.get(name)) is not int:
            raise ValueError(f"plan: made for another model, {path!r} is no number in this one")
        attributes[name] = part.new_shape[dim] // per


def _own_parts(module: nn.Module, parts: Mapping[int, TensorPlan]) -> dict[str, TensorPlan]:
    own: dict[str, Tensor] = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        # num_batches_tracked and other counters say nothing about sizes.
        if tensor is not None and tensor.ndim > 0
    }
    if parametrize.is_parametrized(module):
        chains: Any = module.parametrizations
        for name, chain in chains.items():
            # Evaluating it could change its state (spectral norm), so the largest tensor that it
            # is computed from stands for it: of weight norm's magnitude and direction the latter.
            own[name] = max(chain._parameters.values(), key=Tensor.numel)
    return {name: parts.get(id(t), TensorPlan(tuple(t.shape))) for name, t in own.items()}


def _update(layer: _Layer) -> None:
    module = layer.module
    for kind, weighted in _WEIGHTED:
        if isinstance(module, kind):
            weight = layer.weight()
            if weight is None:
                raise ValueError(f"plan: {layer.name!r} holds no weight that its sizes follow")
            return weighted(layer, weight)
    for kind, featured in _FEATURED:
        if isinstance(module, kind):
            return featured(layer)
    if any(_is_opaque(kind) for kind in type(module).__mro__):
        raise ValueError(
            f"plan: cuts {', '.join(n for n, p in layer.parts.items() if p.keep)} of "
            f"{layer.name!r}, a {type(module).__name__}, whose sizes cannot be changed"
        )
    return None


def _is_opaque(kind: type) -> bool:
    """Whether ``kind`` is one of torch's layers: none of those above, by the time it is asked."""
    package = kind.__module__
    return (
        package.startswith("torch.nn.modules.")
        and not package.endswith(".container")
        and kind is not nn.Module
    )
