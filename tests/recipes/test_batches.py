from __future__ import annotations

import itertools

import numpy as np
import torch

from sparsekern.recipes import batches as module
from sparsekern.recipes.batches import Batches
from sparsekern.recipes.data import Split, normalise
from sparsekern.recipes.synthetic import generate


def unequal_split() -> Split:
    """Every pixel has a colour of its own, and a class that follows from it."""
    sizes, images, start = [(40, 33), (32, 50), (37, 37)], [], 0
    for height, width in sizes:
        number = np.arange(start, start + height * width).reshape(height, width)
        images.append(np.stack([number // 65536, number // 256 % 256, number % 256], -1))
        start += height * width
    images = [image.astype(np.uint8) for image in images]
    return Split.from_arrays("abc", images, [image[..., 2] % 7 for image in images])


def test_a_batch_depends_on_seed_and_step_alone():
    split = generate(5, 40, seed=3)
    x, y = Batches(split, 4, 32, seed=1)(7)
    for other, equal in ((Batches(split, 4, 32, seed=1), True), (Batches(split, 4, 32, 2), False)):
        other(3)
        again = other(7)
        assert torch.equal(again[0], x) is equal
        assert torch.equal(again[1], y) is equal
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.float32
    assert y.shape == (4, 32, 32) and y.dtype == torch.int64


def test_steps_are_the_single_batches():
    batches = Batches(generate(5, 40, seed=3), 2, 32, seed=1)
    pairs = zip(batches.steps(2, 5), map(batches, range(2, 5)), strict=True)
    for (x, _), (expected, _) in pairs:
        assert torch.equal(x, expected)


def test_every_image_comes_once_an_epoch_and_epochs_differ():
    batches = Batches(generate(10, 32, seed=0), 4, 32, seed=0)
    order = np.concatenate([batches.indices(step) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])


def test_a_batch_may_be_larger_than_the_split():
    batches = Batches(generate(3, 32, seed=0), 8, 32, seed=0)
    assert np.array_equal(np.bincount(batches.indices(0)), [3, 3, 2]) or (
        sorted(np.bincount(batches.indices(0))) == [2, 3, 3]
    )


def test_crops_are_contiguous_pieces_of_one_image_in_all_8_orientations(monkeypatch):
    monkeypatch.setattr(module, "CONTRAST", 0.0)
    monkeypatch.setattr(module, "BRIGHTNESS", 0.0)
    split = unequal_split()
    batches = Batches(split, 6, 32, seed=5)
    seen = set()
    for step in range(20):
        x, y = batches(step)
        for picture, classes, index in zip(x, y, batches.indices(step), strict=True):
            orientation = find(picture, split.image(index))
            assert orientation is not None
            seen.add(orientation)
            blue = torch.round(picture[2] * 0.225 * 255 + 0.406 * 255).long()
            assert torch.equal(classes, blue % 7)
    assert len(seen) == 8


def find(picture: torch.Tensor, image: np.ndarray) -> tuple[int, bool] | None:
    """The orientation in which `picture` is a piece of `image`."""
    height, width = image.shape[:2]
    whole = normalise(image[None])[0]
    for turns, flip in itertools.product(range(4), (False, True)):
        turned = torch.rot90(picture.flip(2) if flip else picture, turns, (1, 2))
        for top, left in itertools.product(range(height - 31), range(width - 31)):
            if torch.equal(whole[:, top : top + 32, left : left + 32], turned):
                return turns, flip
    return None


def test_contrast_and_brightness_change_within_their_bounds():
    split = generate(4, 32, seed=0)
    batches = Batches(split, 4, 32, seed=0)
    x, _ = batches(0)
    scale = []
    for picture, index in zip(x, batches.indices(0), strict=True):
        plain = normalise(split.image(index)[None])[0]
        scale.append(float(picture.std() / plain.std()))
    assert all(1 - module.CONTRAST <= s <= 1 + module.CONTRAST for s in scale)
    assert max(scale) - min(scale) > 0.01
