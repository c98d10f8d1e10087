"""A failure in one of several processes is an error in all, and changes none of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from distributed.training import Run, batch, start, whole
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.processes import run
from sparsekern.distributed.tensors import local
from sparsekern.prune.state.masking import MASKED

ARGUMENTS: dict[str, Any] = {"round_to": 1}


def _stepped(own: Run, step: int) -> str:
    """The error of one step, empty where there is none."""
    try:
        own.train(range(step, step + 1))
    except RuntimeError as error:
        own.optimizer.zero_grad()
        return str(error)
    return ""


def _rebuilding_fails() -> tuple[list[str], list[tuple[int, ...]], bool, float, list[Tensor]]:
    """A reducer of rank 1 cannot be made at the first shrink."""
    own = start("parallel", shrink=True, **ARGUMENTS)
    assert isinstance(own.model, DistributedDataParallel)
    make, failed = own.model._ddp_init_helper, []

    def fails_once(*args: Any) -> None:
        if own.rank == 1 and not failed:
            failed.append(1)
            raise RuntimeError("no memory for buckets")
        make(*args)

    own.model._ddp_init_helper = fails_once
    errors, shapes = [], []
    for step in range(14):
        before = [tuple(p.shape) for p in own.inner.parameters()]
        if error := _stepped(own, step):
            errors.append(error)
            shapes = [tuple(p.shape) for p in own.inner.parameters()]
            assert shapes == before
    difference = sparsekern.verify(own.inner, own.pruner.compact(), batch(99)[:2])
    return errors, shapes, own.pruner.finished, difference, [p.detach() for p in own.inner.parameters()]


def _written() -> tuple[str, str, bool, list[Tensor]]:
    """Masked rows of rank 1 are written between two events."""
    own = start("parallel", **ARGUMENTS)
    step = 0
    while not (own.pruner._network.masks.state == MASKED).any():
        own.train(range(step, step + 1))
        step += 1
    if own.rank == 1:
        channels = own.pruner.graph.tensors["stem.0.weight"].channels[0]
        assert channels is not None
        own.inner.stem[0].weight.data[own.pruner._network.masks.state[channels] == MASKED] = 1
        own.inner.stem[1].weight.data[own.pruner._network.masks.state[channels] == MASKED] = 1
    first = next(error for i in range(step, 14) if (error := _stepped(own, i)))
    try:
        own.pruner.shrink()
        second = ""
    except RuntimeError as error:
        second = str(error)
    assert bool(own.pruner.remask()) == (own.rank == 1)
    own.train(range(14))
    return first, second, own.pruner.finished, [p.detach() for p in own.inner.parameters()]


def _written_in_parts() -> tuple[str, int, str]:
    """One row of a sharded model, which one process holds."""
    own = start("sharded", **ARGUMENTS)
    own.train(range(14))
    channels = own.pruner.graph.tensors["bare.weight"].channels[0]
    assert channels is not None
    gone = np.flatnonzero((channels >= 0) & (own.pruner._network.masks.state[channels] == MASKED))
    held = local(own.inner.bare.weight)
    here = 0 if own.rank == 0 else len(channels) - len(held)
    rows = [row - here for row in gone.tolist() if here <= row < here + len(held)]
    wrote = own.rank == 1
    if wrote:
        assert rows
        held[rows] = 1
    try:
        own.pruner.compact()
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    count = own.pruner.remask()
    own.pruner.compact()
    assert not whole(own.inner.bare.weight)[gone].any()
    return error, count - len(rows) * wrote, str(own.pruner.finished)


def _each() -> tuple[Any, Any, Any]:
    return _rebuilding_fails(), _written(), _written_in_parts()


def test_errors_of_one_process_are_errors_of_all() -> None:
    (rebuilt, written, parts), (its_rebuilt, its_written, its_parts) = run(_each, 2)
    assert len(rebuilt[0]) == len(its_rebuilt[0]) == 1
    assert "rank 1 failed" in rebuilt[0][0] and "no memory for buckets" in its_rebuilt[0][0]
    assert rebuilt[1] == its_rebuilt[1]
    for result in (rebuilt, its_rebuilt):
        assert result[2] and result[3] < 1e-12
    assert all(map(torch.equal, rebuilt[4], its_rebuilt[4]))

    assert "rank 1 failed" in written[0] and "masked rows: got" in its_written[0]
    assert "rank 1 failed" in written[1] and "masked rows: got" in its_written[1]
    assert written[2] and its_written[2]
    assert all(map(torch.equal, written[3], its_written[3]))

    assert "in other processes" in parts[0] and "masked rows: got" in its_parts[0]
    assert parts[1:] == its_parts[1:] == (0, "True")
