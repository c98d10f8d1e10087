from __future__ import annotations

import numpy as np
import torch

from sparsekern.recipes.data import MEAN, STD, VOID, Data, Split, normalise
from sparsekern.recipes.synthetic import generate


def test_images_of_unequal_sizes_are_kept_as_they_are():
    random = np.random.default_rng(0)
    sizes = [(5, 7), (9, 4), (6, 6)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    masks = [random.integers(0, 2, size, dtype=np.uint8) for size in sizes]
    split = Split.from_arrays(["a", "b", "c"], images, masks)
    assert len(split) == 3
    for index in range(3):
        assert np.array_equal(split.image(index), images[index])
        assert np.array_equal(split.mask(index), masks[index])


def test_normalise_centres_and_scales():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = (pixels / 255.0 - np.array(MEAN)) / np.array(STD)
    x = normalise(pixels)
    assert x.dtype == torch.float32 and x.shape == (2, 3, 5, 4)
    assert np.allclose(x.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-5)


def test_padding_adds_void_and_mean_colour_below_and_to_the_right():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((20, 50), (40, 40))]
    masks = [random.integers(0, 2, image.shape[:2], dtype=np.uint8) for image in images]
    split = Split.from_arrays(["a", "b"], images, masks)
    padded = split.padded(32)
    assert padded.heights.tolist() == [32, 40] and padded.widths.tolist() == [50, 40]
    assert np.array_equal(padded.image(0)[:20], images[0]) and np.array_equal(padded.mask(0)[:20], masks[0])
    assert (padded.mask(0)[20:] == VOID).all() and (padded.image(0)[20:] == (124, 116, 104)).all()
    assert np.array_equal(padded.image(1), images[1]) and np.array_equal(padded.mask(1), masks[1])
    assert padded.has_void and not split.has_void and split.padded(20) is split
    assert split.smaller_than(32) == 1
    assert padded.pixel_counts(2).tolist() == split.pixel_counts(2).tolist()


def test_memory_counts_a_split_that_is_used_twice_once():
    train, val = generate(2, 32, 0), generate(1, 32, 1)
    assert Data(train, val, val).bytes == 3 * 32 * 32 * 4
    assert Data(train, None, val).class_names(3) == ("background", "class 1", "class 2")
