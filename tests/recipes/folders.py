"""Small folders of images and masks for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

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


def assert_same_network(a: Path, b: Path) -> None:
    """Equal plan and equal values, to the bit; the order of the header is left to safetensors."""
    with safe_open(a, "pt") as first, safe_open(b, "pt") as second:
        assert first.metadata() == second.metadata()
        assert sorted(first.keys()) == sorted(second.keys())
        for name in first.keys():  # noqa: SIM118
            assert torch.equal(first.get_tensor(name), second.get_tensor(name)), name
