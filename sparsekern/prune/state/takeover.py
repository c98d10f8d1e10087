"""Constants of channels that are masked move into the bias or the batch norm of the layer that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from sparsekern.distributed.tensors import local, rewritten, whole
from sparsekern.graph import ChannelGraph
from sparsekern.graph.groups import ConstantRead
from sparsekern.graph.propagate.expressions import evaluate


@torch.no_grad()
def take_over(
    graph: ChannelGraph, tensors: Mapping[str, Tensor], chosen: np.ndarray, undo: ExitStack | None = None
) -> None:
    """Add the constants of channels, times their columns, to what their readers add to the output.

    The output of the network then stays the same when the columns are masked, except beside zeros that pad a
    convolution. Tensors of a sharded model are gathered one at a time; all processes have to call this.

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
        if len(gone):
            _add(read, tensors, gone, undo)


def _add(read: ConstantRead, tensors: Mapping[str, Tensor], gone: np.ndarray, undo: ExitStack | None) -> None:
    weight, target = whole(tensors[read.weight]), tensors[read.target]
    numbers, which = np.unique(read.values[gone], return_inverse=True)
    expressions = [read.expressions[number] for number in numbers]
    constants = [evaluate(e, lambda name: whole(tensors[name]), weight).reshape(()) for e in expressions]
    own, place = (torch.from_numpy(a).to(weight.device) for a in (gone, which.reshape(-1)))
    columns = weight.index_select(1, own).reshape(len(weight), len(gone), -1).sum(2)
    moved = columns @ torch.stack(constants)[place]
    if undo is not None:
        held = local(target)
        undo.callback(torch.no_grad()(held.copy_), held.clone())
    with rewritten(target) as values:
        values.add_(moved.to(values), alpha=read.sign)
