"""Predicting masks of images with a stored network and writing them as files."""

from __future__ import annotations

import colorsys
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from sparsekern.compact.store import read
from sparsekern.files.atomic import replacing
from sparsekern.recipes.classes import ClassTable
from sparsekern.recipes.data import MEAN, STD, Data, Split, normalise
from sparsekern.recipes.devices import find_device
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.exported import RUNTIMES, Exported
from sparsekern.recipes.files import check_writable
from sparsekern.recipes.images import EXTENSIONS, read_image
from sparsekern.recipes.metrics import Scores, evaluate, predict
from sparsekern.recipes.networks import NetworkSpec, Padded
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.stored import read_spec, rebuild
from sparsekern.recipes.synthetic import load

NOT_DEEP = (
    "has grey images of 16 bits, expected images of 8 bits, as the network was trained on; convert them to 8 "
    "bits first"
)
# Share of the class colour in an overlay.
OPACITY = 0.45


class Segmenter:
    """A stored network of the recipes, ready for images of any size.

    Args:
        path: a `model.safetensors` of a training, or the `.onnx` or `.xml` that `sparsekern export` made.
        device: device of the computation; the CPU for exported files.

    Attributes:
        spec: description of the network, its input and its output.
        network: the network in evaluation mode, for normalised images `[N, 3, H, W]` of any size.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or does not name a network of the recipes.
        InputError: the device does not exist, or an exported file does not run there.
        ModuleNotFoundError: the runtime of an exported file is not installed.
    """

    spec: NetworkSpec

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.device = find_device(device)
        network: nn.Module
        if path.suffix in RUNTIMES:
            if self.device.type != "cpu":
                raise InputError(f"--device: got {device!r}, expected cpu for an exported network")
            network = exported = Exported(path)
            self.spec = exported.spec
        else:
            stored = read(path)
            self.spec, network = read_spec(stored), rebuild(stored)
        self.network = Padded(network, self.spec.stride).to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The class of each pixel, uint8 `[H, W]`, of an RGB image, uint8 `[H, W, 3]`."""
        x = normalise(image[None], self.spec.mean, self.spec.std).to(self.device)
        return predict(self.network(x))[0].to(torch.uint8).cpu().numpy()

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Read an image file as in the training, RGB uint8 `[H, W, 3]`.

        Raises:
            InputError: the file cannot be read, or has 16 bits and the training had no such images.
        """
        image = read_image(path, "IMAGES", self.spec.reading.bits)
        if image.dtype != np.uint8:
            raise InputError(f"IMAGES: {path} {NOT_DEEP}")
        # The copy is writable; torch warns about Pillow's read-only arrays.
        return image.astype(np.uint8)

    def load(self, root: Path, table: ClassTable | None = None) -> Data:
        """Read images with masks and divide them into splits as in the training.

        Args:
            root: a folder, a CSV list, or `synthetic:KIND`.
            table: see `synthetic.load`.

        Raises:
            InputError: see `synthetic.load` and `read`.
        """
        reading = self.spec.reading
        settings = Settings(
            classes=self.spec.classes,
            ignore=reading.ignore,
            validation=reading.validation,
            seed=reading.seed,
            crop=reading.crop,
        )
        data = load(root, settings, table, reading.bits)
        if data.bits != reading.bits and data.bits is not None:
            raise InputError(f"--data: {root} {NOT_DEEP}")
        return data

    def evaluate(self, split: Split) -> Scores:
        """Scores on images with masks.

        Raises:
            InputError: the network was trained with another normalisation than that of this version.
        """
        if (self.spec.mean, self.spec.std) != (MEAN, STD):
            raise InputError(
                f"MODEL: got one for images of mean {self.spec.mean} and std {self.spec.std}, expected "
                f"{MEAN} and {STD}, as this version scores them"
            )
        return evaluate(self.network, split, self.spec.classes)


def find_images(arguments: Sequence[str]) -> list[Path]:
    """The image files named by files, directories and patterns such as `scans/*.tif`, in order, each once.

    Raises:
        InputError: an argument matches no image.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_file():
            paths = [path]
        elif path.is_dir():
            paths = _images_in(path)
        else:
            paths = [Path(name) for name in sorted(glob.glob(argument, recursive=True))]
            paths = [name for name in paths if name.is_file()]
        if not paths:
            raise InputError(
                f"IMAGES: got {argument!r}, expected an image, a directory of images "
                f"({', '.join(EXTENSIONS)}), or a pattern that some file matches"
            )
        found.update(dict.fromkeys(paths))
    return list(found)


def write_masks(
    segmenter: Segmenter, images: Sequence[Path], out: Path, *, overlay: bool = False
) -> Iterator[Path]:
    """Write `NAME.png` in `out` for every image `NAME.*`, with the same height and width.

    Masks have 8 bits: 0 and 255 for a network with two classes, else class indices. The names of all results
    are checked before the first image is read. Each mask is written when the iterator advances.

    Args:
        segmenter: the network.
        images: image files.
        out: the output directory, created if missing.
        overlay: whether to write `NAME_overlay.png`, too: the image with its classes in colour.

    Yields:
        The path of each written mask.

    Raises:
        InputError: two images would have the same result, a result would replace an image, `out` cannot be
            written, or an image cannot be read.
    """
    results = _result_names(images, out, overlay)
    check_writable(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    factor = 255 if segmenter.spec.classes == 2 else 1
    for path, (mask_path, overlay_path) in zip(images, results, strict=True):
        image = segmenter.read(path)
        classes = segmenter(image)
        _write_png(classes * np.uint8(factor), mask_path)
        if overlay:
            _write_png(coloured(image, classes), overlay_path)
        yield mask_path


def coloured(image: NDArray[np.uint8], classes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image, uint8 `[H, W, 3]`, with a distinct colour over each class except the background."""
    # Steps of the golden ratio around the colour circle keep the colours of few classes far apart.
    hues = (np.arange(256) * 0.618034) % 1.0
    palette = np.array([colorsys.hsv_to_rgb(hue, 0.9, 1.0) for hue in hues]) * 255
    mixed = (1 - OPACITY) * image + OPACITY * palette[classes]
    return np.where(classes[..., None] > 0, mixed.round().astype(np.uint8), image)


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )


def _result_names(images: Sequence[Path], out: Path, overlay: bool) -> list[tuple[Path, Path]]:
    results = [(out / f"{path.stem}.png", out / f"{path.stem}_overlay.png") for path in images]
    sources = {os.path.realpath(path): path for path in images}
    taken: dict[Path, Path] = {}
    for path, names in zip(images, results, strict=True):
        for name in names if overlay else names[:1]:
            if name in taken:
                raise InputError(
                    f"IMAGES: got {taken[name]} and {path}, which would both be written to {name}; expected "
                    "names that differ, or one command for each"
                )
            if os.path.realpath(name) in sources:
                raise InputError(
                    f"--out: got {out}, where {name} would replace an image, expected another directory"
                )
            taken[name] = path
    return results


def _write_png(pixels: NDArray[np.uint8], path: Path) -> None:
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
