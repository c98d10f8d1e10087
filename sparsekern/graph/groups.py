"""The parts of a channel graph: groups of channels, their gates, and the dimensions they run through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from sparsekern.graph.numbers import KeptBlocks, after_removal
from sparsekern.graph.propagate.expressions import Expression, named
from sparsekern.graph.rescale import Rescale


@dataclass(frozen=True, eq=False)
class TensorSlots:
    """The channels of one parameter or buffer.

    Attributes:
        name: as in ``named_parameters()``.
        aliases: further names of the same (tied) tensor.
        shape: sizes of the tensor.
        kind: "parameter" or "buffer".
        channels: per dimension an int64 array of channel ids, -1 where an index always stays; None
            for a dimension that no channel runs through.
        row_dim: the dimension whose slices are zeroed when a channel is masked; None for buffers and
            for parameters that have no rows of their own.
        sizes: attributes of the user's modules that count this tensor's indices, such as the number
            of heads, as (path, dimension, indices per unit): ``blocks.0.attn.num_heads`` equals
            ``shape[dimension] // indices per unit``.
        rescale: how its values follow the number of its indices, such as the weight of an RMSNorm;
            None if they do not.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Literal["parameter", "buffer"]
    channels: tuple[np.ndarray | None, ...]
    row_dim: int | None
    sizes: tuple[tuple[str, int, int], ...] = ()
    rescale: Rescale | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that run through the same dimensions of the same tensors: a width of the network.

    Attributes:
        id: the group's number, its index in ``ChannelGraph.groups``.
        name: module of the first producer.
        channels: channel ids, int64, contiguous.
        producers: names of the weights whose rows are these channels, depthwise ones last.
        members: every (tensor, dimension) that the channels run through.
        consumers: the (tensor, dimension) pairs of weights that are contracted over the channels.
        inexact: why removing some channels changes what the others compute (``exact=False``); empty if
            it does not.
        of_blocks: whether each channel stands for a block of a list of modules; see ``Block``.
        masked_columns: those of ``consumers`` whose columns are masked with the channels. A masked channel
            reaches them as a constant, not as zero, so they stay at zero in training, too.
    """

    id: int
    name: str
    channels: np.ndarray
    producers: tuple[str, ...]
    members: tuple[tuple[str, int], ...]
    consumers: tuple[tuple[str, int], ...]
    inexact: str = ""
    of_blocks: bool = False
    masked_columns: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, eq=False)
class ConstantRead:
    """A layer that reads constants, and the tensor that takes them over when their channels are masked.

    Attributes:
        weight: name of the layer's weight, whose dimension 1 holds the columns.
        values: for each column the index in ``expressions`` of the constant that it reads, int64, -1 if it
            is not known.
        expressions: the constants; see ``evaluate``.
        target: name of the layer's bias, or of the running mean of the batch norm that alone reads the
            output of the layer.
        sign: 1.0 for a bias, -1.0 for a running mean.
    """

    weight: str
    values: np.ndarray
    expressions: tuple[Expression, ...]
    target: str
    sign: float

    def restricted(self, stay: np.ndarray | None, names: KeptBlocks) -> ConstantRead | None:
        """The layer in a smaller network; None if it went.

        Args:
            stay: the columns that stay, bool ``[columns]``; None for all.
            names: the blocks that stay.
        """
        weight, target = after_removal(self.weight, names), after_removal(self.target, names)
        if weight is None or target is None:
            return None

        def name_of(tensor: str) -> str:
            # Nobody reads an expression of a tensor that went.
            return after_removal(tensor, names) or tensor

        return replace(
            self,
            weight=weight,
            values=self.values if stay is None else self.values[stay],
            expressions=tuple(named(one, name_of) for one in self.expressions),
            target=target,
        )


class Gates(NamedTuple):
    """The rows that set each channel's scale, in compressed sparse rows.

    Channel c has the entries ``offsets[c]:offsets[c + 1]`` of ``tensors`` and ``rows``.

    The gates of a producer are gamma and beta of the normalisations that read its output, if every
    reader is a normalisation with an affine. Ops that pass a scale on (moves, concatenation, pooling,
    relu) may lie between. Otherwise the gates are the producer's weight and bias. A producer whose
    zeros reach no consumer has no gates, such as the last layer of a squeeze-and-excitation block,
    which a sigmoid follows.

    Attributes:
        offsets: int64 [C + 1].
        tensors: indices into ``names``, int64.
        rows: indices along the tensor's row dimension, int64.
        names: names of the parameters.
    """

    offsets: np.ndarray
    tensors: np.ndarray
    rows: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """Why some indices of a dimension of a tensor stay.

    Attributes:
        dim: the dimension.
        count: the number of its indices that stay for this reason.
        reason: the reason.
    """

    dim: int
    count: int
    reason: str
