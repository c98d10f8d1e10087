"""The image sets of the comparison, with the steps and crops of the trainings on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from sparsekern.recipes.data import Split
from sparsekern.recipes.load import load_data
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import KINDS, splits

FOLDER = "dsb2018"
GENERATED = ("vessels", "membranes", "scenes")
SIZE = 96  # edge of the generated images in pixels
TRAIN, TEST = 256, 64  # number of generated images
TESTED = 33  # scored images of a folder; the cost of a dense network on large images limits it

LR_WARMUP = 0.05  # share of the steps in which the learning rate rises
UNET = Settings(model="unet", width=16, steps=400, batch=4, crop=64, lr=2e-3)
MOBILENET = Settings(model="mobilenetv3", width=1.0, steps=400, batch=4, crop=96, lr=2e-3)

_DENSE = {"dsb2018": 0.002, "vessels": 0.008, "membranes": 0.008, "scenes": 0.004}
# The learning rates by network, arm and set, as tuning has found them (`tuning.py`). For the default UNet no
# rate is better than that of the dense network by more than chance.
RATES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "unet": {
        "dense": _DENSE,
        "default": _DENSE,
        "narrow": {"dsb2018": 0.008, "vessels": 0.016, "membranes": 0.016, "scenes": 0.016},
    },
    "mobilenetv3": {
        "dense": {"dsb2018": 0.016, "scenes": 0.016},
        "default": {"dsb2018": 0.008, "scenes": 0.016},
        "x0.5": {"dsb2018": 0.008, "scenes": 0.016},
    },
}


@dataclass(frozen=True)
class Set:
    """Images with masks.

    Attributes:
        name: of the set.
        load: gives the training and the test split.
        classes: number of classes, background included.
        void: mask value of pixels that count neither in the loss nor in the scores, None for none.
    """

    name: str
    load: Callable[[], tuple[Split, Split]]
    classes: int = 2
    void: int | None = None

    def settings(self, model: Settings) -> Settings:
        """How a network of `model` trains on these images."""
        return replace(model, classes=self.classes)


def find_sets(folder: Path | None) -> dict[str, Set]:
    """The sets by name; `dsb2018` only where `folder` holds it."""
    found = {name: Set(name, _generated(name), KINDS[name].classes, KINDS[name].void) for name in GENERATED}
    if folder is not None:
        found = {FOLDER: Set(FOLDER, _folder(folder))} | found
    return found


def classes_of(name: str) -> int:
    """Number of classes of a set, background included."""
    return KINDS[name].classes if name in KINDS else 2


def _generated(name: str) -> Callable[[], tuple[Split, Split]]:
    return cache(lambda: splits(KINDS[name], train=TRAIN, test=TEST, size=SIZE))


def _folder(folder: Path) -> Callable[[], tuple[Split, Split]]:
    def load() -> tuple[Split, Split]:
        data = load_data(folder, Settings(classes=2, validation=0))
        return data.train, evenly(data.test, TESTED)

    return cache(load)


def evenly(split: Split, count: int) -> Split:
    """`count` images, evenly spread over `split`; all where it has fewer."""
    which = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)).tolist()
    return Split.from_arrays(
        [split.names[i] for i in which], [split.image(i) for i in which], [split.mask(i) for i in which]
    )
