"""Generated images with masks, of several kinds, for trainings without a data set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekern.recipes.data import Split, load_folder
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.synthetic import cells, membranes, scenes, vessels
from sparsekern.recipes.synthetic.cells import generate as generate

PREFIX = "synthetic:"
SIZE = 128  # pixels an edge of generated images


@dataclass(frozen=True)
class Kind:
    """A generator and what its masks hold.

    Attributes:
        generate: `(count, size, seed)` to a split of square images of `size` pixels.
        classes: number of classes, background included.
        void: mask value of pixels that belong to no class, None where there are none.
    """

    generate: Callable[[int, int, int], Split]
    classes: int = 2
    void: int | None = None


KINDS: Mapping[str, Kind] = {
    "cells": Kind(cells.generate),
    "membranes": Kind(membranes.generate),
    "scenes": Kind(scenes.generate, len(scenes.CLASSES), scenes.VOID),
    "vessels": Kind(vessels.generate),
}


def find(text: str) -> Kind | None:
    """The kind that `text` names as `synthetic:KIND`, None for any other text, such as a folder.

    Raises:
        InputError: there is no such kind.
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


def load(data: str | os.PathLike[str], classes: int, crop: int = 0) -> tuple[Split, Split]:
    """Training and test images of `synthetic:KIND`, or of a folder.

    Args:
        data: which of them.
        classes: number of classes, background included.
        crop: generated images are at least so large.

    Raises:
        InputError: there is no such kind, it has another number of classes, or the folder cannot be used
            (:func:`sparsekern.recipes.data.load_folder`).
    """
    kind = find(os.fspath(data))
    if kind is None:
        return load_folder(Path(data), classes)
    if classes != kind.classes:
        raise InputError(f"--classes: got {classes}, expected {kind.classes} for --data {os.fspath(data)}")
    return splits(kind, size=max(SIZE, crop))


def splits(
    kind: Kind, *, train: int = 256, test: int = 64, size: int = SIZE, seed: int = 0
) -> tuple[Split, Split]:
    """Training and test images of `kind`, which share no image.

    Args:
        kind: what they show.
        train, test: how many.
        size: height and width in pixels.
        seed: of the training images; the test images are those of the seed after it.

    Raises:
        ValueError: a number is too small.
    """
    return kind.generate(train, size, seed), kind.generate(test, size, seed + 1)
