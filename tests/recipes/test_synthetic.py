from __future__ import annotations

import numpy as np

from sparsekern.recipes.synthetic import generate


def test_equal_seeds_give_equal_images_and_different_ones_others():
    first, again, other = (generate(3, 48, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.pixels, other.pixels)


def test_images_look_like_nuclei_on_background():
    split = generate(24, 64, seed=0)
    assert len(split) == 24 and split.image(0).shape == (64, 64, 3)
    assert set(np.unique(split.labels)) == {0, 1}
    contrast, dark = [], 0
    for index in range(len(split)):
        mask, grey = split.mask(index) == 1, split.image(index).mean(2)
        assert 0.01 < mask.mean() < 0.7
        contrast.append(grey[mask].mean() - grey[~mask].mean())
        dark += contrast[-1] < 0
    # Both kinds of light occur, and nuclei stand out in either.
    assert 2 <= dark <= 18
    assert np.min(np.abs(contrast)) > 5


def test_any_size_and_count():
    for count, size in ((1, 32), (17, 40)):
        split = generate(count, size, seed=0)
        assert len(split) == count and set(split.heights) == {size}
