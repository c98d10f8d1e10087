"""Pieces of a tensor that is divided along one dimension fill parts of one that is divided along another."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsekern.distributed.pieces import overlap
from sparsekern.distributed.tensors import Part

WHOLE = torch.arange(7 * 5).reshape(7, 5)
BOUNDS = {0: [(0, 3), (3, 6), (6, 7), (7, 7)], 1: [(0, 2), (2, 4), (4, 5), (5, 5)]}


@pytest.mark.parametrize(("source", "target"), itertools.product((0, 1), (0, 1, None)))
def test_every_part_gets_its_entries(source: int, target: int | None) -> None:
    """Parts are uneven, and the last one is empty."""
    for start, stop in BOUNDS[target or 0]:
        size = stop - start
        part = Part(target, start, size, 3, None)
        expected = WHOLE if target is None else WHOLE.narrow(target, start, size)
        made = torch.full_like(expected, -1)
        for first, end in BOUNDS[source]:
            view, where = overlap(WHOLE.narrow(source, first, end - first), source, first, part)
            assert made[where].shape == view.shape
            made[where].copy_(view)
        assert torch.equal(made, expected)
