"""Masks of every kind are read as the classes that they were made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes.kinds import SHAPE, classes, write_flat

from sparsekern.recipes.data import VOID, Data
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.load import classes_of, load_data
from sparsekern.recipes.settings import Settings

COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255], [128, 64, 0]], np.uint8)


def numbers(index: int, width: int) -> np.ndarray:
    """A mask in which every pixel is an object of its own."""
    return np.arange(index * width, (index + 1) * width, dtype=np.uint16)


def load(root: Path, count: int = 2, **options: object) -> Data:
    table = classes_of(root)
    return load_data(root, Settings(classes=count, **options), table)


def truth(data: Data, count: int = 2, of=classes) -> None:
    """Every image of every split has the classes that its number stands for."""
    seen = 0
    for split in (data.train, data.val, data.test):
        for place, name in enumerate(split.names):
            index = int(Path(name).stem.strip("n"))
            assert np.array_equal(split.mask(place), of(index, count)), name
            seen += 1
    assert seen == 4


def palette(index: int, order=(0, 1), count: int = 2) -> Image.Image:
    """A mask with a palette in which class `c` has the number `order[c]`."""
    image = Image.fromarray(np.array(order, np.uint8)[classes(index, count)], mode=None).convert("L")
    indexed = Image.frombytes("P", image.size, image.tobytes())
    table = np.zeros((256, 3), np.uint8)
    table[list(order)] = COLOURS[:count]
    indexed.putpalette(table.tobytes())
    return indexed


def alpha(index: int, count: int = 2) -> np.ndarray:
    mask = classes(index, count)
    return np.dstack([COLOURS[mask], np.where(mask, 255, 0).astype(np.uint8)])


TWO = {
    "0 and 1": lambda i: classes(i),
    "0 and 255": lambda i: classes(i) * np.uint8(255),
    "0 and 7": lambda i: classes(i) * np.uint8(7),
    "1 bit": lambda i: Image.fromarray(classes(i) * np.uint8(255)).convert("1"),
    "grey as RGB": lambda i: Image.fromarray(classes(i) * np.uint8(255)).convert("RGB"),
    "grey + alpha": lambda i: Image.fromarray(classes(i) * np.uint8(255)).convert("LA"),
    "RGBA": lambda i: Image.fromarray(classes(i) * np.uint8(255)).convert("RGBA"),
    "16 bits": lambda i: classes(i).astype(np.uint16) * 65535,
    "16 bits of indices": lambda i: classes(i).astype(np.uint16),
    "one colour": lambda i: COLOURS[classes(i)],
    "transparent background": alpha,
    "palette": palette,
    "palette, other number": lambda i: palette(i, (0, 9)),
    "palettes in another order each": lambda i: palette(i, ((0, 1), (1, 0))[i % 2]),
}


@pytest.mark.parametrize("kind", TWO)
def test_two_classes_of_any_kind(tmp_path, kind):
    truth(load(write_flat(tmp_path / "data", of=TWO[kind])))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_black_and_white_jpeg_masks_are_thresholded(tmp_path, suffix):
    def block(index: int, count: int = 2) -> np.ndarray:
        mask = np.zeros((64, 64), np.uint8)
        mask[: 8 * index + 8] = 1
        return mask

    root = write_flat(tmp_path / "data", mask="{}." + suffix, of=lambda i: block(i) * np.uint8(255))
    for index in range(4):
        Image.new("RGB", (64, 64)).save(root / "images" / f"n{index}.png")
    truth(load(root), of=block)
    with pytest.raises(InputError, match=r"n\d\.jpe?g is a JPEG, which changes the values of a mask"):
        load(root, 3)


MANY = {
    "indices": lambda i: classes(i, 4),
    "16 bits": lambda i: classes(i, 4).astype(np.uint16),
    "palette": lambda i: palette(i, (0, 1, 2, 3), 4),
}


@pytest.mark.parametrize("kind", MANY)
def test_more_classes_by_index(tmp_path, kind):
    truth(load(write_flat(tmp_path / "data", of=MANY[kind]), 4), 4)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "palette", "palettes that differ"])
@pytest.mark.parametrize("table", ["classes.csv", "classes.json", "class_dict.csv"])
def test_more_classes_by_colour(tmp_path, kind, table):
    made = {
        "RGB": lambda i: COLOURS[classes(i, 4)],
        "RGBA": lambda i: Image.fromarray(COLOURS[classes(i, 4)]).convert("RGBA"),
        "palette": lambda i: palette(i, (0, 1, 2, 3), 4),
        "palettes that differ": lambda i: palette(i, ((0, 1, 2, 3), (3, 2, 1, 0))[i % 2], 4),
    }
    root = write_flat(tmp_path / "data", of=made[kind])
    names = ["back", "red", "blue", "brown"]
    if table == "classes.json":
        (root / table).write_text(json.dumps(dict(zip(names, COLOURS.tolist(), strict=True))))
    elif table == "classes.csv":
        rows = [f"{n}; #{r:02x}{g:02x}{b:02x}" for n, (r, g, b) in zip(names, COLOURS, strict=True)]
        (root / table).write_text("\n".join(["name;color", *rows]))
    else:
        rows = [f"{n}, {r}, {g}, {b}" for n, (r, g, b) in zip(names, COLOURS, strict=True)]
        (root / table).write_text("\n".join(["name, r, g, b", *rows, "Void,9,9,9"]), encoding="utf-8-sig")
    data = load(root, 4)
    truth(data, 4)
    assert data.names == tuple(names)


def with_void(value: int, count: int):
    def of(index: int, number: int = count) -> np.ndarray:
        mask = classes(index, number).astype(np.uint16 if value > 255 else np.uint8)
        mask[0, :3] = value
        return mask

    return of


@pytest.mark.parametrize(("value", "ignore"), [(255, "auto"), (255, 255), (9, 9), (65535, 65535)])
def test_void_is_a_value_that_is_no_class(tmp_path, value, ignore):
    data = load(write_flat(tmp_path / "data", of=with_void(value, 3)), 3, ignore=ignore)
    assert (data.train.mask(0)[0, :3] == VOID).all() and data.train.has_void
    assert data.train.mask(0).ravel()[3:].max() == 2
    assert any(f"mask value {value} is void" in note for note in data.notes)


def test_void_of_two_classes_has_to_be_named(tmp_path):
    root = write_flat(tmp_path / "data", of=with_void(255, 2))
    with pytest.raises(InputError, match="has the value 255, but --classes is 2"):
        load(root)
    assert load(root, ignore=255).train.has_void
    with pytest.raises(InputError, match="has the value 255, but --classes is 3"):
        load(root, 3, ignore="none")


def test_values_and_void_of_a_table(tmp_path):
    values = np.array([0, 40, 200, 90], np.uint8)
    root = write_flat(tmp_path / "data", of=lambda i: values[classes(i, 4)])
    (root / "classes.csv").write_text("name,value\nback,0\ncell,40\nwall,200\nvoid,90\n")
    data = load(root, 3)
    expected = {0: 0, 1: 1, 2: 2, 3: VOID}
    index = int(data.train.names[0][1])
    assert np.array_equal(data.train.mask(0), np.vectorize(expected.get)(classes(index, 4)))


def test_a_class_that_never_occurs_is_said(tmp_path):
    root = write_flat(tmp_path / "data", of=lambda i: classes(i, 2))
    (root / "classes.txt").write_text("back\ncell\nwall\n")
    data = load(root, 3)
    assert "no training mask has the class 2 (wall)" in data.notes


def half_transparent(index: int) -> np.ndarray:
    return np.dstack([COLOURS[classes(index)], np.full(SHAPE, 100, np.uint8)])


def shape_in_alpha(index: int) -> np.ndarray:
    return np.dstack([np.zeros((*SHAPE, 3), np.uint8), classes(index) * np.uint8(255)])


BAD = {
    "a value too large": (
        lambda i: classes(i, 4),
        2,
        "value 2.*value 3, but --classes is 2",
    ),
    "one colour too many": (lambda i: COLOURS[classes(i, 4)], 4, "has the colour #ff0000.*classes file"),
    "0, 1 and 255": (lambda i: classes(i) * np.uint8(1 + 254 * (i % 2)), 2, "has the value 255"),
    "1 and 2": (lambda i: classes(i) + np.uint8(1), 2, "has the value 2, but --classes is 2"),
    "numbered objects": (
        lambda i: numbers(i, 48).reshape(SHAPE),
        2,
        "value 2",
    ),
    "half transparent": (half_transparent, 2, "has half-transparent pixels"),
    "black with alpha": (shape_in_alpha, 2, "in the transparency alone"),
    "no whole numbers": (lambda i: classes(i).astype(np.float32), 2, "has the pixel format F"),
    "all void": (lambda i: np.full(SHAPE, 255, np.uint8), 3, "all training masks are void"),
}


@pytest.mark.parametrize("case", BAD)
def test_masks_that_tell_no_classes_are_refused(tmp_path, case):
    of, count, message = BAD[case]
    mask = "{}.tif" if case == "no whole numbers" else "{}.png"
    root = write_flat(tmp_path / "data", of=of, mask=mask)
    with pytest.raises(InputError, match=f"^--data: .*{message}"):
        load(root, count)


def test_many_objects_are_more_values_than_a_byte_has(tmp_path):
    root = write_flat(
        tmp_path / "data", of=lambda i: np.arange(i * 100, i * 100 + 100, dtype=np.uint16)[None]
    )
    for index in range(4):
        Image.new("RGB", (100, 1)).save(root / "images" / f"n{index}.png")
    with pytest.raises(InputError, match="more than 256 different values; expected one value for each class"):
        load(root)


TABLES = {
    "classes.txt": ("only\n", "names 1 classes"),
    "classes.json": ("{", "Expecting"),
    "classes.csv": ("name,color\na,#ff0000\nb,red\n", "is no colour"),
    "class_dict.csv": ("label,r,g,b\na,1,2,3\n", "without name"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, name):
    text, message = TABLES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"--classes-file: .*{name} cannot be used .*{message}"):
        classes_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["a,a", '["a", 3]', "[[[[", '{"a": "b"}', '{"a": 1, "b": 1}', '{"a": [1, 2], "b": [1, 2, 3]}']
)
def test_json_tables_of_other_shapes_are_refused(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(InputError, match="--classes-file: .*cannot be used"):
        classes_of(tmp_path)


def test_names_alone_and_their_number(tmp_path):
    root = write_flat(tmp_path / "data", of=lambda i: classes(i, 3))
    tables = {
        "classes.txt": "back\n\nred cell\nwall\n",
        "classes.json": '{"0": "back", "2": "wall", "1": "red cell"}',
    }
    for name, text in tables.items():
        (root / name).write_text(text)
        assert load(root, 3).names == ("back", "red cell", "wall")
        with pytest.raises(InputError, match="--classes: got 4, expected 3 as the classes file names"):
            load(root, 4)
        (root / name).unlink()
