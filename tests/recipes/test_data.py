from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.folders import write_data

from sparsekern.recipes.data import MEAN, STD, Split, load_folder, normalise
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.synthetic import generate


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path / "data")


def test_a_folder_is_read_as_it_was_written(folder):
    train, test = load_folder(folder, classes=2)
    for split, count, seed in ((train, 6, 1), (test, 3, 2)):
        expected = generate(count, 48, seed)
        assert split.names == expected.names
        assert np.array_equal(split.pixels, expected.pixels)
        assert np.array_equal(split.labels, expected.labels)


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


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_8_bit_images_become_rgb(folder, mode):
    path = folder / "train" / "images" / "0000.png"
    Image.open(path).convert(mode).save(path)
    train, _ = load_folder(folder, classes=2)
    assert train.image(0).shape == (48, 48, 3)


def test_hidden_files_are_no_images(folder):
    (folder / "train" / "masks" / ".DS_Store").write_text("x")
    assert len(load_folder(folder, classes=2)[0]) == 6


def remove_masks_folder(folder):
    for path in (folder / "test" / "masks").iterdir():
        path.unlink()
    (folder / "test" / "masks").rmdir()
    return "test/masks is not a folder", "layout"


def remove_mask(folder):
    (folder / "train" / "masks" / "0002.png").unlink()
    return "train/images/0002.png has no counterpart", "train/masks/0002.png"


def remove_image(folder):
    (folder / "test" / "images" / "0001.png").unlink()
    return "test/masks/0001.png has no counterpart", "test/images/0001.png"


def rename_mask(folder):
    path = folder / "train" / "masks" / "0003.png"
    path.rename(path.with_name("0003_mask.png"))
    return "train/images/0003.png has no counterpart", "expected"


def foreign_file(folder):
    (folder / "train" / "images" / "notes.txt").write_text("x")
    return "notes.txt is misnamed", "NAME.png"


def empty_folders(folder):
    for kind in ("images", "masks"):
        for path in (folder / "train" / kind).iterdir():
            path.unlink()
    return "train/images is empty", "layout"


def broken_image(folder):
    path = folder / "train" / "images" / "0004.png"
    path.write_bytes(path.read_bytes()[:200])
    return "0004.png cannot be read as an image", "--data"


def no_image(folder):
    (folder / "train" / "masks" / "0004.png").write_text("no image")
    return "0004.png cannot be read as an image", "--data"


def unequal_sizes(folder):
    path = folder / "train" / "masks" / "0001.png"
    Image.open(path).crop((0, 0, 30, 40)).save(path)
    return "0001.png is 48x48 pixels, its mask 30x40", "equal sizes"


def large_class(folder):
    path = folder / "test" / "masks" / "0002.png"
    mask = np.array(Image.open(path))
    mask[3, 4] = 255
    Image.fromarray(mask).save(path)
    return "test/masks/0002.png has the value 255", "class indices 0 to 1"


def coloured_mask(folder):
    path = folder / "train" / "masks" / "0000.png"
    Image.open(path).convert("RGB").save(path)
    return "0000.png has the pixel format RGB", "expected L or P or 1"


@pytest.mark.parametrize(
    "damage",
    [
        remove_masks_folder,
        remove_mask,
        remove_image,
        rename_mask,
        foreign_file,
        empty_folders,
        broken_image,
        no_image,
        unequal_sizes,
        large_class,
        coloured_mask,
    ],
)
def test_a_damaged_folder_is_refused_with_path_and_expectation(folder, damage):
    parts = damage(folder)
    with pytest.raises(InputError) as caught:
        load_folder(folder, classes=2)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_crop_larger_than_an_image_is_refused(folder):
    train, _ = load_folder(folder, classes=2)
    train.check_fits(48, "train")
    with pytest.raises(InputError, match=r"--crop is 49, but train/images/0000.png is 48x48"):
        train.check_fits(49, "train")
