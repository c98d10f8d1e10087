"""Small folders of images and masks for tests."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sparsekern.recipes.data import Split
from sparsekern.recipes.synthetic import generate


def write_split(split: Split, folder: Path) -> None:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index, name in enumerate(split.names):
        Image.fromarray(split.image(index)).save(folder / "images" / name)
        Image.fromarray(split.mask(index)).save(folder / "masks" / name)


def write_data(root: Path, train: int = 6, test: int = 3, size: int = 48) -> Path:
    write_split(generate(train, size, seed=1), root / "train")
    write_split(generate(test, size, seed=2), root / "test")
    return root
