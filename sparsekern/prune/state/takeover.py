"""Constants of channels that are masked move into the bias or the batch norm of the layer that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from sparsekern.distributed.tensors import is_sharded
from sparsekern.graph import ChannelGraph
from sparsekern.graph.groups import ConstantRead
from sparsekern.graph.propagate.expressions import evaluate


@torch.no_grad()
def take_over(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], chosen: np.ndarray, undo: ExitStack | None = None
) -> None:
    """Add the constants of channels, times their columns, to what their readers add to the output.

    The output of the network then stays the same when the columns are masked, except beside zeros that pad a
    convolution. Sharded models are left as they are: their output changes.

    Args:
        graph: the channels.
        tensors: parameters and buffers of the model or of a copy, by name.
        chosen: bool ``[C]``; the channels that are masked next. Their gates have faded to zero.
        undo: receives callbacks that restore the values.
    """
    for read in graph.constant_reads:
        columns = graph.tensors[read.weight].channels[1] if read.weight in graph.tensors else None
        if columns is None or read.weight not in tensors or read.target not in tensors:
            continue
        gone = np.flatnonzero((columns >= 0) & chosen[columns] & (read.values >= 0))
        if len(gone) and not is_sharded(tensors[read.weight]):
            _add(read, tensors, gone, undo)


def _add(read: ConstantRead, tensors: Mapping[str, Tensor], gone: np.ndarray, undo: ExitStack | None) -> None:
    weight, target = tensors[read.weight].detach(), tensors[read.target].detach()
    numbers, which = np.unique(read.values[gone], return_inverse=True)
    constants = [evaluate(read.expressions[n], tensors.__getitem__, weight).reshape(()) for n in numbers]
    own, place = (torch.from_numpy(a).to(weight.device) for a in (gone, which.reshape(-1)))
    columns = weight.index_select(1, own).reshape(len(weight), len(gone), -1).sum(2)
    moved = columns @ torch.stack(constants)[place]
    if undo is not None:
        undo.callback(torch.no_grad()(target.copy_), target.clone())
    target.add_(moved.to(target), alpha=read.sign)
