"""Augmented training batches as a pure function of (seed, step).

There is no state between steps, so a resumed run has the same batches as a run without a stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsekern.recipes.data import STD, Split, normalise

# Largest relative change of contrast, and of brightness as a share of the full range.
CONTRAST = 0.2
BRIGHTNESS = 0.1

# Keys of independent random streams: the order of an epoch, and the augmentation of a step.
_ORDER, _AUGMENT = 0, 1


@dataclass(frozen=True)
class Batches:
    """Random crops with random orientation, contrast and brightness; every image occurs once per epoch.

    Args:
        split: the images, each at least `crop` pixels high and wide, see `Split.padded`.
        batch: images per step; the next epoch fills up the last batch of an epoch.
        crop: height and width of a batch in pixels.
        seed: seed of order and augmentation.
    """

    split: Split
    batch: int
    crop: int
    seed: int

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of `step` (from 0): images float32 `[B, 3, C, C]` and classes int64 `[B, C, C]`."""
        index = self.indices(step)
        random = np.random.default_rng((self.seed, _AUGMENT, step))
        where = self._crops(index, random)
        x = normalise(self.split.pixels[where])
        contrast, brightness = random.uniform(-1.0, 1.0, (2, len(index), 1, 1, 1))
        x.mul_(torch.from_numpy(1 + CONTRAST * contrast).float())
        x.add_(torch.from_numpy(BRIGHTNESS / np.mean(STD) * brightness).float())
        return x, torch.from_numpy(self.split.labels[where].astype(np.int64))

    def steps(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps `start` to `stop - 1`."""
        return (self(step) for step in range(start, stop))

    def indices(self, step: int) -> NDArray[np.int64]:
        """Indices of the images in the batch of `step`, int64 `[batch]`."""
        count = len(self.split)
        epoch, position = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), count)
        orders = {
            int(e): np.random.default_rng((self.seed, _ORDER, int(e))).permutation(count)
            for e in np.unique(epoch)
        }
        return np.array([orders[int(e)][p] for e, p in zip(epoch, position, strict=True)], dtype=np.int64)

    def _crops(self, index: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Indices into the flat pixels, int64 `[B, crop, crop]`, for crops in one of 8 orientations."""
        split, line = self.split, np.arange(self.crop)
        top = random.integers(0, split.heights[index] - self.crop + 1)
        left = random.integers(0, split.widths[index] - self.crop + 1)
        flip_rows, flip_columns, transpose = random.integers(0, 2, (3, len(index), 1)).astype(bool)
        rows = top[:, None] + np.where(flip_rows, line[::-1], line)
        columns = left[:, None] + np.where(flip_columns, line[::-1], line)
        width = split.widths[index][:, None]
        rows = split.offsets[index][:, None] + rows * width
        return np.where(
            transpose[:, :, None],
            rows[:, None, :] + columns[:, :, None],
            rows[:, :, None] + columns[:, None, :],
        )
