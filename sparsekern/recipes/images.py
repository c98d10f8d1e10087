"""Image and mask files of many kinds, as arrays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sparsekern.recipes.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
LOSSY = ("JPEG", "MPO")

# Modes of Pillow for one channel of more than 8 bits. Colour of 16 bits comes from Pillow with 8.
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
LARGEST = 65535

# Orientations of EXIF that exchange height and width.
TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class Raw:
    """A mask as its file has it.

    Attributes:
        values: uint8, uint16 or int32 `[H, W]`: grey values or numbers of a palette; red * 65536 +
            green * 256 + blue of a mask in colour.
        coloured: whether they are colours.
        palette: the colour (as above) of each number of a palette that occurs; empty without a palette.
        lossy: whether the format changes values.
    """

    values: NDArray[Any]
    coloured: bool
    palette: dict[int, int]
    lossy: bool


def image_size(path: Path, argument: str = "--data") -> tuple[int, int]:
    """Height and width in pixels as the image is to be seen; only the head of the file is read.

    Raises:
        InputError: it is no image that can be read.
    """
    with _opened(path, argument) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (width, height) if turned else (height, width)


def read_image(
    path: Path, argument: str = "--data", bits: int | None = None
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The image as RGB uint8 `[H, W, 3]`, turned as its EXIF orientation says; alpha is left out.

    Args:
        path: of the file.
        argument: named in errors.
        bits: significant bits of grey images of more than 8 bits, which are scaled by it to 8; None gives
            those as they are, uint16 `[H, W]`.

    Raises:
        InputError: it is no image that can be read, or of a pixel format that is not known.
    """
    with _opened(path, argument) as image:
        image = ImageOps.exif_transpose(image)
        mode = image.mode
        if mode in DEEP:
            deep = _deep(image, path, argument)
            return deep if bits is None else scaled(deep, bits)
        if mode in ("F", "LAB"):
            raise InputError(
                f"{argument}: {path} has the pixel format {mode}; expected whole numbers of 8 or 16 bits, "
                f"grey or in colour"
            )
        return np.asarray(image.convert("RGB"))


def scaled(deep: NDArray[np.uint16], bits: int) -> NDArray[np.uint8]:
    """Grey values of `bits` significant bits, uint16 `[H, W]`, as RGB uint8 `[H, W, 3]`."""
    grey = (deep.astype(np.uint32) * 255 + (1 << bits) // 2) // ((1 << bits) - 1)
    return np.repeat(np.minimum(grey, 255).astype(np.uint8)[..., None], 3, 2)


def read_mask(path: Path, argument: str = "--data") -> Raw:
    """The mask as its file has it, turned as its EXIF orientation says.

    Colours that are all grey are grey values. Transparent pixels are black.

    Raises:
        InputError: it is no image that can be read, or of a pixel format that tells no classes.
    """
    with _opened(path, argument) as image:
        lossy = image.format in LOSSY
        image = ImageOps.exif_transpose(image)
        mode = image.mode
        if mode in DEEP:
            return Raw(_deep(image, path, argument), False, {}, lossy)
        if mode in ("1", "L"):
            return Raw(np.asarray(image).astype(np.uint8), False, {}, lossy)
        if mode == "P":
            return _indexed(image, lossy)
        if mode in ("RGB", "RGBA", "LA", "RGBX"):
            return _colours(
                np.asarray(image.convert("RGBA" if "A" in mode else "RGB")), path, argument, lossy
            )
    raise InputError(
        f"{argument}: {path} has the pixel format {mode}; expected a mask of classes: grey, with a palette, "
        f"or RGB"
    )


@contextmanager
def _opened(path: Path, argument: str) -> Iterator[Image.Image]:
    """An image with a single frame; what goes wrong in the block is an InputError."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of images of more than 89 megapixels, which whole slides have.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":
                    raise InputError(f"{argument}: {path} has {frames} frames; expected a single image")
                yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{argument}: {path} is not there; expected an image") from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
    ) as error:
        raise InputError(
            f"{argument}: {path} cannot be read as an image ({error}); expected one of "
            f"{', '.join(EXTENSIONS)}, whole"
        ) from error


def _deep(image: Image.Image, path: Path, argument: str) -> NDArray[np.uint16]:
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > LARGEST:
        raise InputError(f"{argument}: {path} has values from {low} to {high}; expected 0 to {LARGEST}")
    return array.astype(np.uint16)


def _indexed(image: Image.Image, lossy: bool) -> Raw:
    values = np.asarray(image)
    flat = np.asarray(image.getpalette("RGB") or [], dtype=np.int64)
    colours = flat[: len(flat) // 3 * 3].reshape(-1, 3) @ (65536, 256, 1)
    used = np.flatnonzero(np.bincount(values.reshape(-1)))
    return Raw(values, False, {int(i): int(colours[i]) for i in used if i < len(colours)}, lossy)


def _colours(array: NDArray[np.uint8], path: Path, argument: str, lossy: bool) -> Raw:
    colour = array[..., :3].astype(np.int32)
    if array.shape[2] == 4:
        alpha = array[..., 3]
        if ((alpha > 0) & (alpha < 255)).any():
            raise InputError(
                f"{argument}: {path} has half-transparent pixels; expected a mask whose pixels are opaque or "
                f"transparent"
            )
        if not colour[alpha > 0].any() and (alpha == 0).any() and (alpha > 0).any():
            raise InputError(
                f"{argument}: {path} is black, with its shape in the transparency alone; expected classes as "
                f"grey values or colours"
            )
        colour = colour * (alpha > 0)[..., None]
    if (colour == colour[..., :1]).all():
        return Raw(colour[..., 0].astype(np.uint8), False, {}, lossy)
    return Raw(colour @ np.array([65536, 256, 1], np.int32), True, {}, lossy)
