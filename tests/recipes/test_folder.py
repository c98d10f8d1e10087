"""Which files are found, and how they are distributed over the splits."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes.folders import write_data, write_split
from recipes.kinds import classes, picture, write_flat

from sparsekern.recipes.data import Data
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.load import load_data
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import generate


@pytest.fixture
def folder(tmp_path):
    return write_data(tmp_path / "data")


def load(root: Path, **options: object) -> Data:
    return load_data(root, Settings(**{"crop": 32} | options))


def names(data: Data) -> list[list[str]]:
    return [[] if split is None else list(split.names) for split in (data.train, data.val, data.test)]


def test_a_folder_is_read_as_it_was_written(folder):
    write_split(generate(2, 48, seed=3), folder / "val")
    data = load(folder)
    for split, count, seed in ((data.train, 6, 1), (data.val, 2, 3), (data.test, 3, 2)):
        expected = generate(count, 48, seed)
        assert split.names == expected.names
        assert np.array_equal(split.pixels, expected.pixels)
        assert np.array_equal(split.labels, expected.labels)
    assert data.notes == ()
    assert data.summary("here") == "6 training, 2 validation and 3 test images in here, 0.1 MB in memory"


def test_without_val_some_training_images_are_split_off_by_seed(folder):
    data = load(folder, validation=0.3)
    train, val, test = names(data)
    assert len(val) == 2 and sorted(train + val) == [f"{i:04d}.png" for i in range(6)]
    assert np.array_equal(data.test.pixels, generate(3, 48, 2).pixels)
    assert data.notes == ("no val/: 2 of 6 training images are for validation, by --seed 0",)
    assert names(load(folder, validation=0.3)) == [train, val, test]
    others = [names(load(folder, validation=0.3, seed=seed))[1] for seed in range(1, 6)]
    assert any(other != val for other in others)
    whole = generate(6, 48, seed=1)
    for place, name in enumerate(data.val.names):
        assert np.array_equal(data.val.image(place), whole.image(int(name[:4])))


def test_no_validation_at_all_is_said(folder):
    data = load(folder, validation=0)
    assert data.val is None and len(data.train) == 6
    assert data.notes == ("no validation images: no scores while training",)


def test_without_test_the_validation_images_are_read_once_for_both(folder):
    (folder / "test").rename(folder / "validation")
    data = load(folder)
    assert data.test is data.val and len(data.val) == 3 and "scored at the end, too" in data.notes[0]
    train_only = folder / "validation"
    train_only.rename(folder.parent / "elsewhere")
    data = load(folder)
    assert data.test is data.val and len(data.val) == 1 and len(data.train) == 5


def test_a_flat_folder_is_dealt_to_three_splits(tmp_path):
    root = write_flat(tmp_path / "data", 10)
    data = load(root, validation=0.2)
    train, val, test = names(data)
    assert [len(train), len(val), len(test)] == [6, 2, 2]
    assert len({*train, *val, *test}) == 10
    assert "6 images for training, 2 for validation and 2 for test" in data.notes[0]
    assert names(load(root, validation=0.2)) == [train, val, test]
    assert names(load(root, validation=0.2, seed=1)) != [train, val, test]


def test_splits_below_images_and_masks(tmp_path):
    for split in ("training", "valid", "test"):
        write_flat(tmp_path / split, 2)
        for kind, other in (("images", "Images"), ("masks", "labels")):
            (tmp_path / "data" / other).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / kind).rename(tmp_path / "data" / other / split)
    assert [len(found) for found in names(load(tmp_path / "data"))] == [2, 2, 2]


PATTERNS = [
    ("{}.png", "{}_mask.png"),
    ("{}.PNG", "{}_Mask.PNG"),
    ("{}.jpg", "{}.png"),
    ("{}.JPEG", "{}-mask.png"),
    ("{}.tif", "{}_gt.tif"),
    ("{}.tiff", "{}_label.bmp"),
    ("{}.bmp", "mask_{}.png"),
    ("{}.webp", "{}_segmentation.png"),
    ("img_{}.png", "mask_{}.png"),
    ("{}_image.jpg", "{}_gt.gif"),
    ("{}.png", "{}.mask.png"),
    ("a b {}.png", "a b {}.png"),
    ("ü{}.png", unicodedata.normalize("NFD", "ü") + "{}.png"),
]


@pytest.mark.parametrize(("image", "mask"), PATTERNS)
def test_names_of_images_and_their_masks(tmp_path, image, mask):
    data = load(write_flat(tmp_path / "data", 4, image=image, mask=mask))
    found = [name for split in names(data) for name in split]
    assert sorted(found) == sorted(image.format(f"n{index}") for index in range(4))
    for split in (data.train, data.val, data.test):
        for place, name in enumerate(split.names):
            index = next(i for i in range(4) if f"n{i}" in name)
            assert np.array_equal(split.mask(place), classes(index))
            if not image.lower().endswith(("jpg", "jpeg", "webp")):
                assert np.array_equal(split.image(place), picture(index))


@pytest.mark.parametrize("name", [".DS_Store", "._n0.png", "Thumbs.db", "desktop.ini", ".hidden/"])
def test_files_of_other_programs_are_left_out(tmp_path, name):
    root = write_flat(tmp_path / "data")
    for kind in ("images", "masks"):
        path = root / kind / name
        path.mkdir() if name.endswith("/") else path.write_text("x")
    assert sum(map(len, names(load(root)))) == 4


def without_masks(folder):
    for path in (folder / "test" / "masks").iterdir():
        path.unlink()
    (folder / "test" / "masks").rmdir()
    return "test/masks is not a folder", "layout"


def without_a_mask(folder):
    (folder / "train" / "masks" / "0002.png").unlink()
    return "train/images/0002.png has no counterpart", "train/masks/0002.png"


def without_an_image(folder):
    (folder / "test" / "images" / "0001.png").unlink()
    return "test/masks/0001.png has no counterpart", "test/images/0001.png"


def two_masks(folder):
    path = folder / "train" / "masks" / "0003.png"
    path.with_name("0003_mask.png").write_bytes(path.read_bytes())
    return "train/masks/0003_mask.png has no counterpart", "expected"


def two_suffixes(folder):
    path = folder / "train" / "masks" / "0003.png"
    path.with_name("0003_gt.png").write_bytes(path.read_bytes())
    path.rename(path.with_name("0003_mask.png"))
    return "0003_gt.png, ", "0003_mask.png belong together; expected one image and one mask"


def same_name(folder):
    path = folder / "train" / "images" / "0003.png"
    Image.open(path).save(path.with_suffix(".bmp"))
    return "0003.png and 0003.bmp have the same name", "expected one of them"


def other_file(folder):
    (folder / "train" / "images" / "notes.txt").write_text("x")
    return "notes.txt is misnamed", "NAME.png"


def inner_folder(folder):
    (folder / "train" / "images" / "more").mkdir()
    return "train/images/more is a folder", "expected images"


def empty(folder):
    for kind in ("images", "masks"):
        for path in (folder / "train" / kind).iterdir():
            path.unlink()
    return "train/images is empty", "layout"


def two_folders(folder):
    (folder / "train" / "labels").mkdir()
    return "train has labels and masks", "expected one of them"


def no_train(folder):
    (folder / "train").rename(folder / "other")
    return "train is not a folder", "layout"


DAMAGES = [
    without_masks,
    without_a_mask,
    without_an_image,
    two_masks,
    two_suffixes,
    same_name,
    other_file,
    inner_folder,
    empty,
    two_folders,
    no_train,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_path_and_expectation(folder, damage):
    parts = damage(folder)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert str(caught.value).startswith("--data: ")


def test_the_first_few_of_many_faults_are_listed(folder):
    for path in (folder / "train" / "masks").iterdir():
        path.unlink()
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(caught.value).count("has no counterpart") == 5 and "; and 1 more" in str(caught.value)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_split_are_refused(tmp_path, count):
    with pytest.raises(InputError, match=f"got {count} images without splits, expected at least 3"):
        load(write_flat(tmp_path / "data", count))


def listed(tmp_path: Path, text: str) -> Path:
    write_flat(tmp_path / "files", 4)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8-sig")
    return tmp_path / "list.csv"


def row(index: int, *more: str, mark: str = ",") -> str:
    return mark.join([f"files/images/n{index}.png", f"files/masks/n{index}.png", *more])


@pytest.mark.parametrize("mark", [",", ";", "\t", ", "])
def test_a_list_says_what_is_where(tmp_path, mark):
    splits = ["train", "Train", "validation", "test"]
    rows = [row(index, split, mark=mark) for index, split in enumerate(splits)]
    data = load(listed(tmp_path, "\n".join([mark.join(["Image", "Mask", "Split"]), *rows])))
    assert names(data) == [["n0.png", "n1.png"], ["n2.png"], ["n3.png"]]
    assert np.array_equal(data.val.mask(0), classes(2))


def test_a_list_without_splits_is_dealt(tmp_path):
    data = load(
        listed(
            tmp_path,
            "\n".join(
                ["mask,image,note", *(f"files/masks/n{i}.png,files/images/n{i}.png," for i in range(4))]
            ),
        )
    )
    assert [len(found) for found in names(data)] == [2, 1, 1]


LISTS = {
    "no column": ("picture,mask\n", "has the columns picture, mask; expected image, mask"),
    "empty": ("", "has the columns none; expected image, mask"),
    "no rows": ("image,mask\n", "it has no rows"),
    "split": (
        f"image,mask,split\n{row(0, 'learn')}\n",
        "line 2 has the split 'learn', expected train, val or",
    ),
    "no split": (f"image,mask,split\n{row(0)}\n", "line 2 has the split '', expected train"),
    "twice": (
        f"image,mask,split\n{row(0, 'train')}\n{row(0, 'test')}\n",
        "line 3 has .*n0.png again, after line 2",
    ),
    "no file": (f"image,mask\n{row(9)}\n", "line 2: .*images/n9.png does not exist; line 2: .*masks/n9.png"),
    "no mask": ("image,mask\nfiles/images/n0.png,\n", "line 2 lacks an image or a mask"),
    "no train": (f"image,mask,split\n{row(0, 'test')}\n", "no row of the split train"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_cannot_be_used_is_refused_with_the_line(tmp_path, case):
    text, message = LISTS[case]
    with pytest.raises(InputError, match=f"^--data: .*{message}"):
        load(listed(tmp_path, text))


def test_a_binary_file_is_no_list(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00\x00\x81")
    with pytest.raises(InputError, match="cannot be read .*expected a CSV list or a folder"):
        load(tmp_path / "list.csv")
