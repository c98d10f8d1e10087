"""Generated images with masks, of several kinds, for training without a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekern.recipes.classes import ClassTable
from sparsekern.recipes.data import Data, Split
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.load import classes_of, load_data
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import cells, membranes, scenes, vessels
from sparsekern.recipes.synthetic.cells import generate as generate

PREFIX = "synthetic:"
SIZE = 128  # pixels an edge of generated images


@dataclass(frozen=True)
class Kind:
    """A generator of images and the classes of its masks.

    Attributes:
        generate: `(count, size, seed)` to a split of square images of `size` pixels.
        names: names of the classes, background first.
        void: mask value of pixels without a class; None if there are none.
    """

    generate: Callable[[int, int, int], Split]
    names: tuple[str, ...]
    void: int | None = None

    @property
    def classes(self) -> int:
        """Number of classes, background included."""
        return len(self.names)


KINDS: Mapping[str, Kind] = {
    "cells": Kind(cells.generate, ("background", "nucleus")),
    "membranes": Kind(membranes.generate, ("inside", "membrane")),
    "scenes": Kind(scenes.generate, scenes.NAMES, scenes.VOID),
    "vessels": Kind(vessels.generate, ("background", "vessel")),
}


def find(text: str) -> Kind | None:
    """The kind that `text` names as `synthetic:KIND`; None for any other text, such as a folder.

    Raises:
        InputError: the kind is unknown.
    """
    return named(text) if text.startswith(PREFIX) else None


def named(text: str) -> Kind:
    """The kind that `text` names as `synthetic:KIND`.

    Raises:
        InputError: there is no such kind.
    """
    kind = KINDS.get(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else None
    if kind is None:
        names = ", ".join(PREFIX + name for name in KINDS)
        raise InputError(f"--data: got {text!r}, expected one of {names}")
    return kind


def table_of(data: str | os.PathLike[str], file: Path | None = None) -> ClassTable | None:
    """The classes in a file for `data`, see :func:`sparsekern.recipes.load.classes_of`.

    Raises:
        InputError: the file cannot be used, or `data` is generated and its classes have names already.
    """
    if find(os.fspath(data)) is None:
        return classes_of(Path(data), file)
    if file is not None:
        raise InputError(f"--classes-file: got {file} with --data {os.fspath(data)}, expected none")
    return None


def load(
    data: str | os.PathLike[str],
    settings: Settings,
    table: ClassTable | None = None,
    bits: int | None = None,
) -> Data:
    """The images of `synthetic:KIND`, of a folder, or of a CSV list.

    Args:
        data: `synthetic:KIND` or a path.
        settings: settings of the run; generated images are at least as large as its crop.
        table, bits: arguments of :func:`sparsekern.recipes.load.load_data` for files.

    Raises:
        InputError: the kind is unknown or has another number of classes or another void value, or the files
            cannot be used (:func:`sparsekern.recipes.load.load_data`).
    """
    kind, name = find(os.fspath(data)), os.fspath(data)
    if kind is None:
        return load_data(Path(data), settings, table, bits)
    if settings.classes != kind.classes:
        raise InputError(f"--classes: got {settings.classes}, expected {kind.classes} for --data {name}")
    if kind.void is not None and settings.ignore not in ("auto", kind.void):
        raise InputError(f"--ignore: got {settings.ignore}, expected auto or {kind.void} for --data {name}")
    return generated(kind, size=max(SIZE, settings.crop))


def generated(kind: Kind, *, train: int = 256, test: int = 64, size: int = SIZE, seed: int = 0) -> Data:
    """The images of :func:`splits`, with as many validation images as test images."""
    first, last = splits(kind, train=train, test=test, size=size, seed=seed)
    return Data(first, kind.generate(test, size, seed + 2), last, kind.names)


def splits(
    kind: Kind, *, train: int = 256, test: int = 64, size: int = SIZE, seed: int = 0
) -> tuple[Split, Split]:
    """Training and test images of `kind`, without common images.

    Args:
        kind: kind of the images.
        train, test: numbers of images.
        size: height and width in pixels.
        seed: seed of the training images; the test images have the next seed.

    Raises:
        ValueError: a number is too small.
    """
    return kind.generate(train, size, seed), kind.generate(test, size, seed + 1)
