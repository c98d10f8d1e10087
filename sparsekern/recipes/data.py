"""Images and masks in memory, and the folder layout they are read from.

Layout: `DIR/{train,test}/{images,masks}/NAME.png`; masks are 8-bit class indices, 0 = background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

LAYOUT = "DIR/{train,test}/{images,masks}/NAME.png"
IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P")
MASK_MODES = ("L", "P", "1")

# ImageNet's, so that weights that were trained on it fit.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split:
    """Images with masks, of any sizes, as flat arrays: one gather then cuts a whole batch.

    Attributes:
        names: N file names, sorted.
        pixels: uint8 `[P, 3]`, the RGB pixels of all images, row by row.
        labels: uint8 `[P]`, the class of each.
        offsets, heights, widths: int64 `[N]`, where an image starts in the above, and its size.
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
        """Packs images uint8 `[H, W, 3]` and masks uint8 `[H, W]`, N of each."""
        heights = np.array([mask.shape[0] for mask in masks], dtype=np.int64)
        widths = np.array([mask.shape[1] for mask in masks], dtype=np.int64)
        sizes = heights * widths
        return cls(
            tuple(names),
            np.concatenate([image.reshape(-1, 3) for image in images]),
            np.concatenate([mask.reshape(-1) for mask in masks]),
            np.cumsum(sizes) - sizes,
            heights,
            widths,
        )

    def __len__(self) -> int:
        return len(self.names)

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

    def check_fits(self, crop: int, split: str) -> None:
        """Refuses a training crop that some image cannot fill.

        Raises:
            InputError: an image is lower or narrower than `crop` pixels; names it.
        """
        small = np.flatnonzero(np.minimum(self.heights, self.widths) < crop)
        if small.size:
            index = int(small[0])
            raise InputError(
                f"--crop is {crop}, but {split}/images/{self.names[index]} is "
                f"{self.widths[index]}x{self.heights[index]} pixels; expected every image to be at "
                f"least as large as the crop ({small.size} of {len(self)} are not)"
            )


def normalise(pixels: NDArray[np.uint8], mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """RGB uint8 `[N, H, W, 3]` to float32 `[N, 3, H, W]`, scaled by mean and std, ImageNet's by default."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).contiguous()
    shift = torch.tensor(mean).mul(255).view(1, 3, 1, 1)
    scale = torch.tensor(std).mul(255).view(1, 3, 1, 1)
    return x.sub_(shift).div_(scale)


def load_folder(root: Path, classes: int) -> tuple[Split, Split]:
    """Reads the train and test split of a folder of the layout above.

    Args:
        root: the folder, `DIR` in the layout.
        classes: number of classes, background included; masks must be below it.

    Raises:
        InputError: a folder is missing or empty; an image has no mask or the reverse; a file is not
            a readable PNG of 8 bits; an image and its mask differ in size; a mask has a value of
            `classes` or above. The message names the path.
    """
    root = Path(root)
    folders = {
        (split, kind): root / split / kind for split in ("train", "test") for kind in ("images", "masks")
    }
    for folder in folders.values():
        if not folder.is_dir():
            raise InputError(f"--data: {folder} is not a folder; expected the layout {LAYOUT}")
    return _load_split(root / "train", classes), _load_split(root / "test", classes)


def _load_split(folder: Path, classes: int) -> Split:
    names = _paired_names(folder / "images", folder / "masks")
    images, masks = [], []
    for name in names:
        image = _read(folder / "images" / name, IMAGE_MODES, "RGB")
        mask = _read(folder / "masks" / name, MASK_MODES, None)
        if image.shape[:2] != mask.shape:
            raise InputError(
                f"--data: {folder / 'images' / name} is {image.shape[1]}x{image.shape[0]} pixels, "
                f"its mask {mask.shape[1]}x{mask.shape[0]}; expected equal sizes"
            )
        largest = int(mask.max())
        if largest >= classes:
            raise InputError(
                f"--data: {folder / 'masks' / name} has the value {largest}, but --classes is "
                f"{classes}; expected class indices 0 to {classes - 1}"
            )
        images.append(image)
        masks.append(mask)
    return Split.from_arrays(names, images, masks)


def _paired_names(images: Path, masks: Path) -> list[str]:
    names = {folder: _png_names(folder) for folder in (images, masks)}
    for here, there in ((images, masks), (masks, images)):
        alone = sorted(names[here] - names[there])
        if alone:
            raise InputError(
                f"--data: {here / alone[0]} has no counterpart; expected {there / alone[0]} "
                f"({len(alone)} of {len(names[here])} files of {here} have none)"
            )
    if not names[images]:
        raise InputError(f"--data: {images} is empty; expected the layout {LAYOUT}")
    return sorted(names[images])


def _png_names(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    foreign = sorted(name for name in names if not name.endswith(".png"))
    if foreign:
        raise InputError(f"--data: {folder / foreign[0]} is misnamed; expected NAME.png")
    return names


def read_image(path: Path) -> NDArray[np.uint8]:
    """The pixels of an image file as the network sees them, uint8 `[H, W, 3]`, RGB.

    Raises:
        InputError: it is not a readable image of 8 bits; names the file.
    """
    return _read(path, IMAGE_MODES, "RGB")


def _read(path: Path, modes: tuple[str, ...], convert: str | None) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode in modes:
                array = np.asarray(image.convert(convert) if convert else image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"--data: {path} cannot be read as an image ({error})") from error
    if mode not in modes:
        raise InputError(
            f"--data: {path} has the pixel format {mode}; expected {' or '.join(modes)} (8 bits)"
        )
    return np.ascontiguousarray(array, dtype=np.uint8)
