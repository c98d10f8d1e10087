"""The size attributes of modules, such as ``out_channels``, after parts of their tensors are removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekern.graph.rescale import Rescale
from sparsekern.nn import MultiheadAttention

Sizes = dict[str, int | tuple[int, ...]]

# A module with a reparametrised weight (torch.nn.utils.prune, weight_norm) holds it under these names.
_WEIGHT_NAMES = ("weight", "weight_orig", "weight_v")
_SUFFIXES = ("_orig", "_v", "_g", "_mask")


class Part(Protocol):
    """The part of a tensor that stays.

    Attributes:
        shape: sizes of the whole tensor.
        keep: the increasing indices that stay, by dimension.
        new_shape: sizes of the part.
        sizes: attributes of the user's modules that count indices; see ``Kept``.
        rescale: how its values follow the number of its indices; None if they do not.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def keep(self) -> Mapping[int, np.ndarray]: ...
    @property
    def new_shape(self) -> tuple[int, ...]: ...
    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def rescale(self) -> Rescale | None: ...


@dataclass(frozen=True)
class Kept:
    """A plain ``Part``.

    Attributes:
        shape: sizes of the whole tensor.
        keep: the increasing indices that stay, by dimension. A dimension that stays whole is absent.
        sizes: attributes of the user's modules that count indices of a dimension, by path, as
            (dimension, indices per unit).
        rescale: how its values follow the number of its indices; None if they do not.
    """

    shape: tuple[int, ...]
    keep: Mapping[int, np.ndarray] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rescale: Rescale | None = None

    @property
    def new_shape(self) -> tuple[int, ...]:
        return tuple(len(self.keep[d]) if d in self.keep else size for d, size in enumerate(self.shape))


@dataclass(frozen=True)
class _Layer:
    """A module and the parts of its own tensors that stay.

    Attributes:
        name: the module's path in the model.
        module: the module.
        parts: the part of every tensor, by the tensor's name in the module.
    """

    name: str
    module: Any
    parts: Mapping[str, Part]

    def weight(self) -> Part | None:
        for name in _WEIGHT_NAMES:
            if name in self.parts:
                return self.parts[name]
        return None

    def features(self) -> Part:
        """The part of the tensor whose name sorts first. The tensors of a normalisation must agree."""
        return self.parts[min(self.parts)]

    def blocks(self, part: Part, count: int) -> int:
        """Count the blocks of dimension 0 that are left.

        Args:
            part: a part of one of the module's tensors.
            count: the number of equal blocks in the whole tensor.

        Returns:
            The number of blocks of which any index stays.

        Raises:
            ValueError: the blocks that are left differ in size.
        """
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
        """Check that every one-dimensional tensor of the module keeps ``size`` elements.

        Raises:
            ValueError: a tensor keeps another number.
        """
        for name, part in self.parts.items():
            if len(part.shape) == 1 and part.new_shape != (size,):
                raise ValueError(
                    f"plan: {self.name}.{name} keeps {part.new_shape[0]} of {part.shape[0]}, "
                    f"expected {size} to fit the other tensors of the module"
                )


def _conv(layer: _Layer, weight: Part) -> Sizes:
    module = layer.module
    # Dimension 0 runs over all groups; dimension 1 counts positions inside one group. A part removes
    # whole groups (depthwise) or the same number of channels from every group.
    groups = layer.blocks(weight, module.groups)
    first, second = weight.new_shape[0], weight.new_shape[1] * groups
    into, out = (first, second) if module.transposed else (second, first)
    layer.require(out)
    return {"in_channels": into, "out_channels": out, "groups": groups}


def _linear(layer: _Layer, weight: Part) -> Sizes:
    out, into = weight.new_shape
    layer.require(out)
    return {"in_features": into, "out_features": out}


def _embedding(layer: _Layer, weight: Part) -> Sizes:
    if 0 in weight.keep:
        raise ValueError(f"plan: got a part of the vocabulary of {layer.name!r}, expected all of it")
    return {"embedding_dim": weight.new_shape[1]}


def _batch_norm(layer: _Layer) -> Sizes:
    size = layer.features().new_shape[0]
    layer.require(size)
    return {"num_features": size}


def _group_norm(layer: _Layer) -> Sizes:
    part = layer.features()
    size = part.new_shape[0]
    layer.require(size)
    return {"num_channels": size, "num_groups": layer.blocks(part, layer.module.num_groups)}


def _layer_norm(layer: _Layer) -> Sizes:
    shape = layer.features().new_shape
    if any(part.new_shape != shape for part in layer.parts.values()):
        raise ValueError(f"plan: got different shapes for the tensors of {layer.name!r}, expected one shape")
    return {"normalized_shape": shape}


def _prelu(layer: _Layer) -> Sizes:
    return {"num_parameters": layer.features().new_shape[0]}


def _recurrent(layer: _Layer) -> Sizes:
    module = layer.module
    if module.proj_size:
        raise ValueError(_unknown(layer.name, module, layer.parts))
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    sizes = {tuple(_units(part, gates).tolist()) for part in layer.parts.values()}
    inner = [p for n, p in layer.parts.items() if n.startswith("weight_hh")]
    columns = {len(part.keep.get(1, range(part.shape[1]))) for part in inner}
    left = layer.parts["weight_ih_l0"].new_shape[0] // gates
    if len(sizes) > 1 or columns != {left}:
        raise ValueError(_unknown(layer.name, module, layer.parts))
    return {"input_size": layer.parts["weight_ih_l0"].new_shape[1], "hidden_size": left}


def _units(part: Part, gates: int) -> np.ndarray:
    """Which rows of all gates stay, int64; each gate keeps the same ones.

    Raises:
        ValueError: gates keep different rows.
    """
    rows = np.zeros(part.shape[0], bool)
    rows[part.keep.get(0, slice(None))] = True
    table = rows.reshape(gates, -1)
    if (table != table[0]).any():
        raise ValueError("plan: keeps parts of units, expected the rows of all gates of a unit")
    return np.flatnonzero(table[0])


def _attention(layer: _Layer) -> Sizes:
    module = layer.module
    if not MultiheadAttention.fits(module):
        raise ValueError(_unknown(layer.name, module, layer.parts))
    packed = "in_proj_weight" in layer.parts
    query, key, value = ["in_proj_weight"] * 3 if packed else [f"{n}_proj_weight" for n in "qkv"]
    return {
        "num_heads": _heads(layer),
        "embed_dim": layer.parts[query].new_shape[1],
        "kdim": layer.parts[key].new_shape[1],
        "vdim": layer.parts[value].new_shape[1],
    }


def _heads(layer: _Layer) -> int:
    """The number of heads that are left.

    Raises:
        ValueError: queries, keys and values keep different heads, or a part of a head.
    """
    module = layer.module
    inner = module.num_heads * module.head_dim
    left = []
    for part in layer.parts.values():
        rows = np.zeros(part.shape[0], bool)
        rows[part.keep.get(0, slice(None))] = True
        left += list(rows.reshape(-1, inner))
    whole = left[0].reshape(module.num_heads, module.head_dim)[:, 0]
    if any((rows != np.repeat(whole, module.head_dim)).any() for rows in left):
        raise ValueError(f"plan: keeps parts of the heads of {layer.name!r}, expected whole ones")
    return int(whole.sum())


# By class of torch, the tensors that determine its sizes. Tensors that a subclass adds are not checked.
_TENSORS: tuple[tuple[type[nn.Module], frozenset[str]], ...] = (
    (nn.modules.batchnorm._NormBase, frozenset({"weight", "bias", "running_mean", "running_var"})),
    (
        nn.MultiheadAttention,
        frozenset({"in_proj_weight", "in_proj_bias", *(f"{name}_proj_weight" for name in "qkv")}),
    ),
)
_WEIGHT_AND_BIAS = frozenset({"weight", "bias"})

_WEIGHTED: tuple[tuple[type[nn.Module], Callable[[_Layer, Part], Sizes]], ...] = (
    (nn.modules.conv._ConvNd, _conv),
    (nn.Linear, _linear),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
)
_FEATURED: tuple[tuple[type[nn.Module], Callable[[_Layer], Sizes]], ...] = (
    (nn.modules.batchnorm._NormBase, _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.PReLU, _prelu),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
)


def sizes(name: str, module: nn.Module, parts: Mapping[int, Part]) -> Sizes:
    """Find the new size attributes of a layer, such as ``out_channels``.

    Only the tensors that torch's class defines count: a subclass may hold others of any size.

    Args:
        name: the layer's path in the model, for messages.
        module: the layer.
        parts: the part of a tensor that stays, by ``id`` of the tensor. Other tensors stay whole.

    Returns:
        New values by attribute. Empty if the layer's tensors stay whole or the class is a user's own.

    Raises:
        ValueError: the sizes of this class of torch cannot be changed, or the parts do not fit each
            other.
    """
    own = _own_parts(module, parts)
    if not any(part.keep for part in own.values()):
        return {}
    layer = _Layer(name, module, own)
    for kind, weighted in _WEIGHTED:
        if isinstance(module, kind):
            weight = layer.weight()
            if weight is None:
                raise ValueError(f"plan: {name!r} holds no weight that its sizes follow")
            return weighted(layer, weight)
    for kind, featured in _FEATURED:
        if isinstance(module, kind):
            return featured(layer)
    if any(_is_opaque(kind) and _makes_tensors(kind) for kind in type(module).__mro__):
        raise ValueError(_unknown(name, module, own))
    return {}


def _unknown(name: str, module: nn.Module, parts: Mapping[str, Part]) -> str:
    return (
        f"plan: cuts {', '.join(n for n, p in parts.items() if p.keep)} of "
        f"{name!r}, a {type(module).__name__}, whose sizes cannot be changed"
    )


def _own_parts(module: nn.Module, parts: Mapping[int, Part]) -> dict[str, Part]:
    own: dict[str, Tensor] = {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        # num_batches_tracked and other counters say nothing about sizes.
        if tensor is not None and tensor.ndim > 0
    }
    if parametrize.is_parametrized(module):
        chains: Any = module.parametrizations
        for name, chain in chains.items():
            # Evaluating the weight could change its state (spectral norm). So the largest tensor that
            # it is computed from represents it: for weight norm the direction, not the magnitude.
            own[name] = max((*chain._parameters.values(), *chain._buffers.values()), key=Tensor.numel)
    own = {name: tensor for name, tensor in own.items() if _is_of_layer(module, name)}
    return {name: parts[id(t)] if id(t) in parts else Kept(tuple(t.shape)) for name, t in own.items()}


def _is_of_layer(module: nn.Module, name: str) -> bool:
    """Whether torch's class defines the tensor ``name``. True for every tensor of an unlisted class."""
    if isinstance(module, nn.RNNBase):
        return name in module._flat_weights_names
    known = [names for kind, names in _TENSORS if isinstance(module, kind)]
    if not known and not isinstance(module, tuple(kind for kind, _ in (*_WEIGHTED, *_FEATURED))):
        return True
    names = known[0] if known else _WEIGHT_AND_BIAS
    return name in names or any(name.removesuffix(end) in names for end in _SUFFIXES)


def _makes_tensors(kind: type) -> bool:
    """Whether ``__init__`` of the class registers tensors. ``nn.ReLU`` registers none."""
    code = getattr(vars(kind).get("__init__"), "__code__", None)
    makers = {"Parameter", "register_parameter", "register_buffer"}
    return code is not None and not makers.isdisjoint(code.co_names)


def _is_opaque(kind: type) -> bool:
    """Whether ``kind`` is a layer of torch. The caller has ruled out the classes listed above."""
    package = kind.__module__
    return (
        package.startswith("torch.nn.modules.")
        and not package.endswith(".container")
        and kind is not nn.Module
    )
