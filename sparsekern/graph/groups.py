"""What a channel graph is made of: groups of channels, their gates, and the dimensions they run through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class TensorSlots:
    """The channels of one parameter or buffer.

    name: as in ``named_parameters()``; aliases: further names of the same (tied) tensor.
    channels: per dimension an int64 array of channel ids, -1 where an index always stays; None
        for a dimension that no channel runs through.
    row_dim: the dimension whose slices are zeroed when a channel is masked; None for buffers and
        for parameters that have no rows of their own.
    sizes: attributes of the user's modules that count this tensor's indices, such as the number
        of heads, as (path, dimension, indices per unit): ``blocks.0.attn.num_heads`` is
        ``shape[dimension] // indices per unit``.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Literal["parameter", "buffer"]
    channels: tuple[np.ndarray | None, ...]
    row_dim: int | None
    sizes: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that run through the same dimensions of the same tensors: a width of the network.

    name: module of the first producer. channels: their ids, contiguous. producers: names of the
    weights whose rows they are, depthwise ones last. members: every (tensor, dimension) they run
    through. consumers: the (tensor, dimension) pairs of weights that are contracted over them.
    inexact: why removing some changes what the others compute (``exact=False``); empty where it does not.
    """

    id: int
    name: str
    channels: np.ndarray
    producers: tuple[str, ...]
    members: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    inexact: str = ""


class Gates(NamedTuple):
    """The rows that set each channel's scale, in compressed sparse rows.

    Channel c has entries ``offsets[c]:offsets[c + 1]`` of ``tensors`` (index into ``names``) and
    ``rows`` (index along the tensor's row dimension). Where every reader of a producer's output,
    through ops that pass a scale on (moves, concatenation, pooling, relu), is a normalisation
    with an affine, the gates are gamma and beta of those normalisations; else the producer's
    weight and bias. Producers whose zeros reach no consumer, such as the last layer of a
    squeeze-and-excitation block behind its sigmoid, have no gates.
    """

    offsets: np.ndarray
    tensors: np.ndarray
    rows: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """``count`` indices of dimension ``dim`` of a tensor stay for ``reason``."""

    dim: int
    count: int
    reason: str
