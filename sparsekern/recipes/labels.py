"""Mapping the values and colours of a set of masks to classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekern.recipes.classes import ClassTable
from sparsekern.recipes.data import VOID
from sparsekern.recipes.errors import InputError, listing
from sparsekern.recipes.images import Raw

GREY = 0x010101  # a grey value times this number is its colour
CODES = 256  # number of codes, as a code is one byte

# Values of a lossy mask in this range are noise. A two-class mask has at most this share of them.
UNSURE, UNSURE_SHARE = (64, 192), 0.02


class Key(NamedTuple):
    """The content of a mask pixel.

    Attributes:
        value: grey value or palette index; None for a colour.
        colour: red * 65536 + green * 256 + blue; None for a grey value above 255.
        palette: whether the colour comes from a palette.
    """

    value: int | None
    colour: int | None
    palette: bool = False


@dataclass
class Coder:
    """Encodes the values of masks as codes, and maps the codes to classes after the last mask.

    The meaning of a value depends on all masks together: 255 is foreground beside 0, but void beside 0 to 20.
    Labels are therefore codes at first, and no mask is kept in its original form or read twice.

    Args:
        classes: number of classes, background included.
        ignore: see `Settings`.
        table: the user's classes.
    """

    classes: int
    ignore: int | str = "auto"
    table: ClassTable | None = None
    _codes: dict[Key, int] = field(default_factory=dict)
    _files: list[list[str]] = field(default_factory=list)

    def encode(self, raw: Raw, path: Path) -> NDArray[np.uint8]:
        """The codes of a mask, uint8 `[H, W]`.

        Raises:
            InputError: the mask is lossy and has more than two classes, or all masks together have more than
                256 values.
        """
        values = self._thresholded(raw, path) if raw.lossy else raw.values
        if values.dtype.itemsize > 2:
            used, inverse = np.unique(values, return_inverse=True)
            codes = np.array([self._code(_key(int(value), raw), path) for value in used], dtype=np.uint8)
            return codes[inverse].reshape(values.shape)
        lookup = np.zeros(np.iinfo(values.dtype).max + 1, np.uint8)
        for value in np.flatnonzero(np.bincount(values.reshape(-1))):
            lookup[value] = self._code(_key(int(value), raw), path)
        return lookup[values]

    def decode(self) -> tuple[NDArray[np.uint8], list[str]]:
        """The class (or `VOID`) of each code, uint8 `[256]`, and a sentence on each choice.

        Raises:
            InputError: a value belongs to no class; the error names the first few files and their values.
        """
        coloured = self._coloured()
        found, notes = self._by_colour() if coloured else self._by_value()
        faults = [
            f"{self._where(code)} has the {_text(key, coloured)}"
            for key, code in sorted(self._codes.items(), key=lambda item: item[1])
            if key not in found
        ]
        if faults:
            raise InputError(
                f"--data: {listing(faults)}, but --classes is {self.classes}; {self._expected(coloured)}"
            )
        lookup = np.full(CODES, VOID, np.uint8)
        for key, code in self._codes.items():
            lookup[code] = found[key]
        return lookup, notes

    def _thresholded(self, raw: Raw, path: Path) -> NDArray[Any]:
        low, high = UNSURE
        unsure = float(((raw.values >= low) & (raw.values < high)).mean())
        if self.classes > 2 or raw.coloured or unsure > UNSURE_SHARE:
            raise InputError(
                f"--data: {path} is a JPEG, which changes the values of a mask; expected PNG or TIFF (JPEG "
                f"only for two classes, black and white)"
            )
        return np.where(raw.values >= (low + high) // 2, 255, 0).astype(np.uint8)

    def _code(self, key: Key, path: Path) -> int:
        if key not in self._codes:
            if len(self._codes) == CODES:
                raise InputError(
                    f"--data: {path} and the masks before it have more than {CODES} different values; "
                    f"expected one value for each class (numbered objects have to become one class)"
                )
            self._codes[key] = len(self._codes)
            self._files.append([])
        code = self._codes[key]
        self._files[code].append(str(path))
        return code

    def _where(self, code: int) -> str:
        first, *others = self._files[code]
        return f"{first} (and {len(others)} more)" if others else first

    def _coloured(self) -> bool:
        """Whether classes are identified by colours instead of values."""
        if any(key.value is None for key in self._codes):
            return True
        palette: dict[int | None, int | None] = {}
        for key in self._codes:
            if key.palette and palette.setdefault(key.value, key.colour) != key.colour:
                return True  # the palettes of two files disagree, so indices have no common meaning
        if self.table is None or not self.table.colours:
            return False
        numbered = all(key.value in range(self.classes) for key in self._codes)
        return not numbered or all(key.colour in self.table.colours for key in self._codes)

    def _by_colour(self) -> tuple[dict[Key, int], list[str]]:
        table = self.table.colours if self.table is not None else {}
        if table:
            return {key: table[key.colour] for key in self._codes if key.colour in table}, []
        others = {key.colour for key in self._codes} - {0}
        if self.classes == 2 and len(others) == 1 and None not in others:
            note = f"colours in masks: #000000 is class 0, #{others.pop():06x} is class 1"
            return {key: int(key.colour != 0) for key in self._codes}, [note]
        return {}, []

    def _by_value(self) -> tuple[dict[Key, int], list[str]]:
        values = {key.value for key in self._codes if key.value is not None}
        void = self._void(values)
        notes = [f"mask value {void} is void: it counts for nothing"] if void in values else []
        values.discard(void)
        if self.table is not None and self.table.values:
            classes = dict(self.table.values)
        elif self.classes == 2 and len(values - {0}) == 1 and max(values) > 1:
            classes = {0: 0, max(values): 1}
            notes.append(f"mask value 0 is class 0, {max(values)} is class 1")
        else:
            classes = {value: value for value in range(self.classes)}
        if void is not None:
            classes[void] = VOID
        return {key: classes[key.value] for key in self._codes if key.value in classes}, notes

    def _void(self, values: set[int]) -> int | None:
        if isinstance(self.ignore, int):
            return self.ignore
        named = self.table is not None and VOID in self.table.values
        auto = self.ignore == "auto" and self.classes > 2 and VOID in values
        return VOID if auto and not named else None

    def _expected(self, coloured: bool) -> str:
        if coloured:
            return "expected the colour of every class in a classes file (classes.csv: name,r,g,b)"
        if self.table is not None and self.table.values:
            return "expected the values of the classes file"
        return (
            f"expected class indices 0 to {self.classes - 1} (two classes: also 0 and another value; "
            f"--ignore for void; a classes file for other values)"
        )


def _key(value: int, raw: Raw) -> Key:
    if raw.coloured:
        return Key(None, value)
    if raw.palette:
        return Key(value, raw.palette.get(value), True)
    return Key(value, value * GREY if value < 256 else None)


def _text(key: Key, coloured: bool) -> str:
    return f"colour #{key.colour:06x}" if coloured and key.colour is not None else f"value {key.value}"
