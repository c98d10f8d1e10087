"""Image files of every kind become 8-bit RGB, seen the right way round."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from recipes.kinds import SHAPE, classes, picture, write_flat

from sparsekern.recipes.errors import InputError
from sparsekern.recipes.images import image_size, read_image, scaled
from sparsekern.recipes.load import load_data
from sparsekern.recipes.settings import Settings

GREY = picture(0)[..., 0]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp", "PNG", "TIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_lossless_formats(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(picture(0)).convert(mode)
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    image.save(path, **options)
    found = read_image(path)
    assert found.dtype == np.uint8 and found.shape == (*SHAPE, 3) and image_size(path) == SHAPE
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_left_out(tmp_path, mode):
    image = Image.fromarray(picture(0))
    image.putalpha(Image.fromarray(GREY))
    if mode != "RGBA":
        image = image.convert("LA")
    image.save(tmp_path / "a.png")
    expected = picture(0) if mode == "RGBA" else np.repeat(np.asarray(image)[..., :1], 3, 2)
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("suffix", ["jpg", "JPEG"])
def test_jpeg_is_close_to_what_was_written(tmp_path, mode, suffix):
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert(mode)
    image.save(tmp_path / f"a.{suffix}", quality=95)
    found = read_image(tmp_path / f"a.{suffix}").astype(int)
    assert np.abs(found - np.asarray(image.convert("RGB"))).max() <= 6


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(classes(0) * np.uint8(255)).convert("1").save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 1], classes(0) * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    """Against the turns that EXIF defines."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16], stored[:8, 16:], stored[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    found = read_image(tmp_path / "a.jpg")
    assert found.shape == turned.shape and image_size(tmp_path / "a.jpg") == turned.shape[:2]
    assert np.abs(found.astype(int) - turned).max() < 40


@pytest.mark.parametrize(("largest", "bits"), [(65535, 16), (4095, 12), (200, 8)])
def test_16_bit_images_share_one_scale(tmp_path, largest, bits):
    root = write_flat(tmp_path / "data")
    deep = [np.random.default_rng(i).integers(0, 100, SHAPE).astype(np.uint16) for i in range(4)]
    deep[2][0, 0] = largest
    for index, values in enumerate(deep):
        Image.fromarray(values).save(root / "images" / f"n{index}.png")
    data = load_data(root, Settings())
    assert data.bits == bits and any(f"0 to {2**bits - 1} becomes" in note for note in data.notes)
    for split in (data.train, data.val, data.test):
        for place, name in enumerate(split.names):
            expected = np.round(deep[int(name[1])] * (255 / (2**bits - 1)))
            assert np.array_equal(split.image(place)[..., 2], expected)
    path = root / "images" / "n2.png"
    assert np.array_equal(read_image(path, bits=bits), scaled(deep[2], bits))


def test_16_bit_tiff_of_both_byte_orders(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, SHAPE).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "little.tif")
    Image.frombytes("I;16B", SHAPE[::-1], values.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    for name in ("little.tif", "big.tif"):
        assert np.array_equal(read_image(tmp_path / name), values)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def damage_text(path):
    path.write_text("no image")


def damage_empty(path):
    path.write_bytes(b"")


def damage_frames(path):
    frames = [Image.new("L", SHAPE[::-1], value) for value in (0, 9)]
    frames[0].save(path, format="TIFF", save_all=True, append_images=frames[1:])


def damage_float(path):
    Image.fromarray(np.zeros(SHAPE, np.float32)).save(path, format="TIFF")


def damage_negative(path):
    Image.fromarray(np.full(SHAPE, -3, np.int32)).save(path, format="TIFF")


MESSAGES = {
    damage_truncate: "cannot be read as an image",
    damage_text: "cannot be read as an image",
    damage_empty: "cannot be read as an image",
    damage_frames: "has 2 frames; expected a single image",
    damage_float: "has the pixel format F; expected whole numbers",
    damage_negative: "has values from -3 to -3; expected 0 to 65535",
}


@pytest.mark.parametrize("damage", MESSAGES)
def test_files_that_cannot_be_used_are_named(tmp_path, damage):
    root = write_flat(tmp_path / "data")
    damage(root / "images" / "n1.png")
    with pytest.raises(InputError, match=f"^--data: .*images/n1.png {MESSAGES[damage]}"):
        load_data(root, Settings())


def test_many_faults_come_at_once(tmp_path):
    root = write_flat(tmp_path / "data", 9)
    for index in range(8):
        damage_truncate(root / "images" / f"n{index}.png")
    with pytest.raises(InputError) as caught:
        load_data(root, Settings())
    assert str(caught.value).count("cannot be read") == 5 and "; and " in str(caught.value)
    assert str(caught.value).startswith("--data: ") and str(caught.value).count("--data") == 1


def test_an_image_and_its_mask_of_other_sizes_are_named(tmp_path):
    root = write_flat(tmp_path / "data", of=lambda i: classes(i)[: 6 - i % 2])
    with pytest.raises(InputError, match=r"n1.png is 8x6 pixels, its mask 8x5; expected equal sizes.*n3.png"):
        load_data(root, Settings())


def test_more_images_than_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    root = write_flat(tmp_path / "data")
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(InputError, match="4 images take 0.0 GB in memory, this machine has"):
        load_data(root, Settings())
