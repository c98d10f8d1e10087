"""The generators of images: every kind is reproducible, and its masks have the stated classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from recipes.folders import write_data

from sparsekern.recipes.errors import InputError
from sparsekern.recipes.metrics import count_confusion
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import (
    KINDS,
    find,
    generate,
    generated,
    load,
    named,
    scenes,
    splits,
    table_of,
)
from sparsekern.recipes.train import Trainer


@pytest.fixture(scope="module")
def images():
    """24 images of 96 pixels of every kind."""
    return {name: kind.generate(24, 96, 5) for name, kind in KINDS.items()}


def shares(split):
    """Share of each class in the pixels of each image, `[N, 256]`."""
    return np.stack(
        [np.bincount(split.mask(i).ravel(), minlength=256) / split.mask(i).size for i in range(len(split))]
    )


@pytest.mark.parametrize("name", KINDS)
def test_equal_seeds_give_equal_images_and_different_ones_others(name):
    first, again, other = (KINDS[name].generate(3, 48, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.pixels, other.pixels)
    assert not np.array_equal(first.labels, other.labels)


@pytest.mark.parametrize("name", KINDS)
def test_the_images_of_a_split_differ(name):
    split = KINDS[name].generate(18, 32, 0)
    assert len({split.image(i).tobytes() for i in range(18)}) == 18
    assert split.names[0] == "0000.png" and set(split.heights) == set(split.widths) == {32}


@pytest.mark.parametrize("name", KINDS)
def test_masks_hold_the_classes_and_nothing_else(name, images):
    kind, present = KINDS[name], set(np.unique(images[name].labels).tolist())
    void = set() if kind.void is None else {kind.void}
    assert present == set(range(kind.classes)) | void


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("count", "size"), [(1, 16), (17, 33), (2, 200)])
def test_any_count_and_size(name, count, size):
    split = KINDS[name].generate(count, size, 0)
    assert len(split) == count and split.image(count - 1).shape == (size, size, 3)
    assert split.pixels.std() > 5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("count", "size", "argument"), [(0, 32, "count"), (1, 15, "size"), (1, 32.5, "size")]
)
def test_numbers_that_make_no_image_are_refused(name, count, size, argument):
    with pytest.raises(ValueError, match=f"{argument}: got .*, expected a whole number of at least"):
        KINDS[name].generate(count, size, 0)


def test_vessels_are_thin(images):
    share = shares(images["vessels"])[:, 1]
    assert 0.03 < share.mean() < 0.08 and share.max() < 0.1 and share.min() > 0.01
    # Erosion by two pixels removes them, so none is wider than five pixels.
    mask = np.stack([images["vessels"].mask(i) for i in range(24)]).astype(bool)
    inner = mask.copy()
    for _ in range(2):
        inner[:, 1:-1, 1:-1] &= (
            inner[:, :-2, 1:-1] & inner[:, 2:, 1:-1] & inner[:, 1:-1, :-2] & inner[:, 1:-1, 2:]
        )
        inner[:, [0, -1]] = inner[:, :, [0, -1]] = False
    assert inner.sum() < 0.03 * mask.sum()


def test_the_contrast_of_vessels_fades_to_none(images):
    split, contrasts = images["vessels"], []
    for i in range(len(split)):
        green, mask = split.image(i)[..., 1].astype(float), split.mask(i).astype(bool)
        for top in range(0, 96, 24):
            for left in range(0, 96, 24):
                own = (slice(top, top + 24), slice(left, left + 24))
                if mask[own].sum() >= 12 and (~mask[own]).sum() > 12:
                    contrasts.append(green[own][~mask[own]].mean() - green[own][mask[own]].mean())
    low, median, high = np.quantile(contrasts, [0.1, 0.5, 0.95])
    # Vessels are darker: a tenth of them by about the noise of a pixel, some by a lot.
    assert median > 10 and low < 8 and high > 20


def test_membranes_are_dark_lines_between_cells(images):
    split = images["membranes"]
    share = shares(split)[:, 1]
    assert 0.1 < share.mean() < 0.3
    for i in range(len(split)):
        grey, mask = split.image(i), split.mask(i).astype(bool)
        assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
        assert grey[mask].mean() < grey[~mask].mean() - 5
    # Not by darkness alone: organelles and noise are as dark, and gaps are not dark.
    grey, mask = split.pixels[:, 0].astype(float), split.labels == 1
    dark = grey < np.quantile(grey, share.mean())
    assert 2 * (dark & mask).sum() / (dark.sum() + mask.sum()) < 0.65


def test_scenes_are_unbalanced_and_have_void(images):
    share = shares(images["scenes"])
    mean = share.mean(0)
    assert mean[scenes.GROUND] > 15 * mean[scenes.SIGN] > 0
    assert mean[[scenes.PERSON, scenes.POLE, scenes.SIGN]].max() < 0.05
    assert 0.02 < mean[scenes.VOID] < 0.12


def test_nearer_things_hide_farther_ones():
    # Of a thing that is whole in no image, others must cover a part: fewer vehicle pixels than were drawn.
    split = KINDS["scenes"].generate(64, 64, 0)
    masks = np.stack([split.mask(i) for i in range(64)])
    beside = (masks[:, :, 1:] == scenes.PERSON) & (masks[:, :, :-1] == scenes.VEHICLE)
    assert beside.any(axis=(1, 2)).sum() > 8


def test_kinds_are_found_by_name():
    assert find("synthetic:vessels") is KINDS["vessels"]
    assert find("some/folder") is None
    with pytest.raises(InputError, match="--data: got 'synthetic:cats', expected one of synthetic:cells, "):
        find("synthetic:cats")
    assert KINDS["cells"].generate is generate


def test_training_and_test_images_differ():
    train, test = splits(KINDS["vessels"], train=4, test=3, size=32, seed=1)
    assert (len(train), len(test)) == (4, 3)
    assert not {train.image(i).tobytes() for i in range(4)} & {test.image(i).tobytes() for i in range(3)}


def test_a_name_in_place_of_a_folder_gives_images():
    data = load("synthetic:vessels", Settings(crop=32))
    assert data.val is not None and data.names == ("background", "vessel")
    assert [len(split) for split in (data.train, data.val, data.test)] == [256, 64, 64]
    assert data.train.heights[0] == 128
    pixels = {split.pixels.tobytes() for split in (data.val, data.test)}
    assert len(pixels) == 2 and data.test.image(0).tobytes() not in {
        data.val.image(index).tobytes() for index in range(64)
    }
    with pytest.raises(InputError, match="--classes: got 2, expected 8 for --data synthetic:scenes"):
        load("synthetic:scenes", Settings())
    with pytest.raises(InputError, match="--ignore: got none, expected auto or 255 for --data synthetic:sc"):
        load("synthetic:scenes", Settings(classes=8, ignore="none"))
    with pytest.raises(InputError, match="--data: got 'folder', expected one of synthetic:cells, "):
        named("folder")
    with pytest.raises(InputError, match=r"--classes-file: got a.csv with --data synthetic:cells, expected"):
        table_of("synthetic:cells", Path("a.csv"))


def test_a_folder_in_place_of_a_name_is_read(tmp_path):
    write_data(tmp_path, train=2, test=1, size=32)
    data = load(tmp_path, Settings(validation=0))
    assert (len(data.train), data.val, len(data.test)) == (2, None, 1)


def test_void_of_scenes_counts_for_nothing_in_a_training():
    settings = Settings(classes=8, width=2, depth=1, batch=2, crop=32, steps=2, keep=None, evaluations=1)
    data = generated(KINDS["scenes"], train=4, test=2, size=32)
    assert data.train.has_void
    trainer = Trainer(settings, data.train, data.val)
    trainer.run()
    assert all(map(math.isfinite, trainer.history.loss)) and len(trainer.history.scores) == 1
    counted = count_confusion(trainer.model, data.test, 8)
    assert int(counted.sum()) == int((data.test.labels != 255).sum()) < data.test.labels.size
