"""Images and masks in memory, ready for a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Mean and standard deviation of ImageNet, for which published backbone weights were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# The label of ignored pixels: pixels with the user's void value, and padding.
VOID = 255

# The largest stride of the models in pixels; smaller images would have no pixel at that resolution.
COARSEST = 32


@dataclass(frozen=True)
class Split:
    """Images of any sizes with masks, as flat arrays, so that one gather cuts a whole batch.

    Attributes:
        names: N file names, sorted.
        pixels: uint8 `[P, 3]`, the RGB pixels of all images, row by row.
        labels: uint8 `[P]`, the class of each pixel, or `VOID`.
        offsets: int64 `[N]`, index of the first pixel of each image in the flat arrays.
        heights, widths: int64 `[N]`, sizes of the images in pixels.
    """

    names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    @classmethod
    def from_arrays(
        cls,
        names: Sequence[str],
        images: Sequence[NDArray[np.uint8]],
        masks: Sequence[NDArray[np.uint8]],
    ) -> Split:
        """Pack N images, uint8 `[H, W, 3]`, and N masks, uint8 `[H, W]`."""
        split = cls.empty(names, [mask.shape[0] for mask in masks], [mask.shape[1] for mask in masks])
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            split.image(index)[:] = image
            split.mask(index)[:] = mask
        return split

    @classmethod
    def empty(cls, names: Sequence[str], heights: Sequence[int], widths: Sequence[int]) -> Split:
        """Allocate a split for N images of these sizes in pixels; `image` and `mask` give views to fill."""
        tall, wide = np.array(heights, dtype=np.int64), np.array(widths, dtype=np.int64)
        sizes = tall * wide
        total = int(sizes.sum())
        pixels, labels = np.empty((total, 3), np.uint8), np.empty(total, np.uint8)
        return cls(tuple(names), pixels, labels, np.cumsum(sizes) - sizes, tall, wide)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_void(self) -> bool:
        """Whether any pixel has the label `VOID`."""
        return bool((self.labels == VOID).any())

    def image(self, index: int) -> NDArray[np.uint8]:
        """Image `index`, uint8 `[H, W, 3]`, a view."""
        height, width = self.heights[index], self.widths[index]
        start = self.offsets[index]
        return self.pixels[start : start + height * width].reshape(height, width, 3)

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Mask `index`, uint8 `[H, W]`, a view."""
        height, width = self.heights[index], self.widths[index]
        start = self.offsets[index]
        return self.labels[start : start + height * width].reshape(height, width)

    def pixel_counts(self, classes: int) -> NDArray[np.int64]:
        """Pixels of each class, int64 `[classes]`."""
        return np.bincount(self.labels, minlength=VOID + 1)[:classes]

    def smaller_than(self, edge: int) -> int:
        """Number of images whose height or width is below `edge` pixels."""
        return int((np.minimum(self.heights, self.widths) < edge).sum())

    def padded(self, edge: int) -> Split:
        """The split with all images padded to at least `edge` pixels in height and width.

        Padding is at the bottom and at the right, with ImageNet's mean colour and the label `VOID`. The split
        itself is returned if no image needs padding.
        """
        if not self.smaller_than(edge):
            return self
        heights, widths = np.maximum(self.heights, edge), np.maximum(self.widths, edge)
        larger = Split.empty(self.names, heights.tolist(), widths.tolist())
        larger.pixels[:] = np.round(np.multiply(MEAN, 255)).astype(np.uint8)
        larger.labels[:] = VOID
        for index in range(len(self)):
            height, width = self.heights[index], self.widths[index]
            larger.image(index)[:height, :width] = self.image(index)
            larger.mask(index)[:height, :width] = self.mask(index)
        return larger


@dataclass(frozen=True)
class Data:
    """The images of a run.

    Attributes:
        train: training images.
        val: validation images, scored during the training; None for no such scores.
        test: test images, scored once after the training.
        names: names of the classes, background first; () if they have only numbers.
        notes: one sentence on each choice that the program made for the user.
        bits: significant bits of 16-bit grey images; None if there are none.
    """

    train: Split
    val: Split | None
    test: Split
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bits: int | None = None

    @property
    def bytes(self) -> int:
        """Memory of images and labels in bytes."""
        splits = {id(split): split for split in (self.train, self.val, self.test) if split is not None}
        return sum(split.pixels.nbytes + split.labels.nbytes for split in splits.values())

    def summary(self, place: Any) -> str:
        """Counts and memory, in one sentence."""
        val = 0 if self.val is None else len(self.val)
        return (
            f"{len(self.train)} training, {val} validation and {len(self.test)} test images in {place}, "
            f"{self.bytes / 1e6:.1f} MB in memory"
        )

    def class_names(self, classes: int) -> tuple[str, ...]:
        """A name for each class."""
        return self.names or ("background", *(f"class {index}" for index in range(1, classes)))


def normalise(pixels: NDArray[np.uint8], mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Convert RGB uint8 `[N, H, W, 3]` to float32 `[N, 3, H, W]`, normalised by mean and std."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).contiguous()
    shift = torch.tensor(mean).mul(255).view(1, 3, 1, 1)
    scale = torch.tensor(std).mul(255).view(1, 3, 1, 1)
    return x.sub_(shift).div_(scale)
