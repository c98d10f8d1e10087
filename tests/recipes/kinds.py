"""Folders of tiny images and masks of every kind that users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (6, 8)
# The classes of each pixel of mask `index`, before they are written in some way.


def classes(index: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(index).integers(0, count, SHAPE).astype(np.uint8)


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(100 + index).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)


def save_png(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path)


def write_flat(
    root: Path,
    count: int = 4,
    *,
    image: str = "{}.png",
    mask: str = "{}.png",
    of: Callable[[int], np.ndarray | Image.Image] = classes,
) -> Path:
    """Folders images/ and masks/ below `root`, the masks as `of` gives them."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for index in range(count):
        Image.fromarray(picture(index)).save(root / "images" / image.format(f"n{index}"))
        content = of(index)
        content = content if isinstance(content, Image.Image) else Image.fromarray(content)
        content.save(root / "masks" / mask.format(f"n{index}"))
    return root
