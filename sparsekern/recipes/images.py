"""Reading image and mask files of many formats as arrays."""

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

# Pillow's modes for one channel of more than 8 bits. Pillow reduces 16-bit colour to 8 bits.
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
LARGEST = 65535

# EXIF orientations that swap height and width.
TURNED = (5, 6, 7, 8)


@dataclass(frozen=True)
class Raw:
    """A mask with the values of its file.

    Attributes:
        values: uint8, uint16 or int32 `[H, W]`: grey values or palette indices; red * 65536 + green * 256 +
            blue in a coloured mask.
        coloured: whether the values are colours.
        palette: the colour (as above) of each palette index that occurs; empty without a palette.
        lossy: whether the file format changes values.
    """

    values: NDArray[Any]
    coloured: bool
    palette: dict[int, int]
    lossy: bool


def image_size(path: Path, argument: str = "--data") -> tuple[int, int]:
    """Height and width in pixels after the EXIF rotation; only the header of the file is read.

    Raises:
        InputError: the file cannot be read as an image.
    """
    with _opened(path, argument) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return (width, height) if turned else (height, width)


def read_image(
    path: Path, argument: str = "--data", bits: int | None = None
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The image as RGB uint8 `[H, W, 3]`, rotated by its EXIF orientation, without alpha.

    Args:
        path: the file.
        argument: the argument named in errors.
        bits: significant bits of grey images with more than 8 bits, which are scaled to 8 bits. With None
            such images are returned unscaled, uint16 `[H, W]`.

    Raises:
        InputError: the file cannot be read as an image, or its pixel format is not supported.
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
    """Convert grey values of `bits` significant bits, uint16 `[H, W]`, to RGB uint8 `[H, W, 3]`."""
    grey = (deep.astype(np.uint32) * 255 + (1 << bits) // 2) // ((1 << bits) - 1)
    return np.repeat(np.minimum(grey, 255).astype(np.uint8)[..., None], 3, 2)


def read_mask(path: Path, argument: str = "--data") -> Raw:
    """The mask with the values of its file, rotated by its EXIF orientation.

    A colour image with only grey colours becomes grey values. Transparent pixels are black.

    Raises:
        InputError: the file cannot be read as an image, or its pixel format cannot encode classes.
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
    """Open an image with a single frame; errors of reading in the block become an InputError."""
    try:
        with warnings.catch_warnings():
            # Pillow warns about images above 89 megapixels, which are common among whole-slide images.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":
                    raise InputError(f"{argument}: {path} has {frames} frames; expected a single image")
                yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{argument}: {path} does not exist; expected an image") from error
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
