"""Reading the images and masks of a run into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsekern.recipes.classes import ClassTable, find_table, load_table
from sparsekern.recipes.data import Data, Split
from sparsekern.recipes.errors import InputError, listing
from sparsekern.recipes.folder import Pair, deal, find_pairs
from sparsekern.recipes.images import Raw, image_size, read_image, read_mask, scaled
from sparsekern.recipes.labels import Coder
from sparsekern.recipes.settings import Settings

READERS = 8  # threads; Pillow releases the interpreter lock while it decodes
BYTES = 4  # per pixel in memory: RGB and class

Size = tuple[int, int]
T = TypeVar("T")
U = TypeVar("U")


def classes_of(data: Path, file: Path | None = None) -> ClassTable | None:
    """The classes of `file`, or of one of `classes.FILES` in the folder of the data; None without a file.

    Raises:
        InputError: the file cannot be used.
    """
    if file is None:
        file = find_table(data if data.is_dir() else data.parent)
    return None if file is None else load_table(file)


def load_data(
    root: Path, settings: Settings, table: ClassTable | None = None, bits: int | None = None
) -> Data:
    """Read a folder or a CSV list of images and masks; docs/data.md describes the supported layouts.

    Several threads decode each file once into arrays of four bytes per pixel.

    Args:
        root: the folder or list.
        settings: settings of the run; classes, ignore, validation, seed and crop are used.
        table: the result of `classes_of`.
        bits: significant bits of 16-bit grey images; None for the bits of the largest value of all images.

    Raises:
        InputError: files are missing, cannot be read or do not fit; the error names the first few of them.
    """
    root = Path(root)
    if table is not None and len(table.names) != settings.classes:
        raise InputError(
            f"--classes: got {settings.classes}, expected {len(table.names)} as the classes file names"
        )
    dealt, notes = deal(find_pairs(root), settings.validation, settings.seed)
    coder = Coder(settings.classes, settings.ignore, table)
    reader = _Reader(coder)
    # Each list is read once, as the validation images may also be the test images.
    lists = {id(found): found for found in dealt.values() if found is not None}
    sizes = _sizes(sorted(pair for found in lists.values() for pair in found))
    _check_memory(sizes.values())
    read = {key: reader.read(found, [sizes[pair] for pair in found]) for key, found in lists.items()}
    _raise(reader.faults)
    splits = {name: None if found is None else read[id(found)] for name, found in dealt.items()}
    lookup, decided = coder.decode()
    for split in read.values():
        np.take(lookup, split.labels, out=split.labels)
    bits = reader.finish(bits)
    if bits is not None:
        notes.append(f"grey images of 16 bits: 0 to {2**bits - 1} becomes 0 to 255")
    train, test = splits["train"], splits["test"]
    assert train is not None and test is not None
    names = () if table is None else table.names
    data = Data(train, splits["val"], test, names, (*notes, *decided), bits)
    return replace(data, notes=(*data.notes, *_warnings(data, settings)))


@dataclass
class _Reader:
    """Decodes files into splits; 16-bit grey images are kept until the largest value is known."""

    coder: Coder
    faults: list[InputError] = field(default_factory=list)
    deep: list[tuple[NDArray[np.uint8], NDArray[np.uint16]]] = field(default_factory=list)

    def read(self, pairs: Sequence[Pair], sizes: Sequence[Size]) -> Split:
        """Read a split whose labels are codes of `coder`; errors are collected in `faults`."""
        names = [pair.image.name for pair in pairs]
        split = Split.empty(names, [height for height, _ in sizes], [width for _, width in sizes])
        for index, outcome in enumerate(_in_threads(_decode, pairs)):
            if isinstance(outcome, InputError):
                self.faults.append(outcome)
                continue
            image, mask = outcome
            try:
                split.mask(index)[:] = self.coder.encode(mask, pairs[index].mask)
            except InputError as error:
                self.faults.append(error)
            if image.ndim == 2:
                self.deep.append((split.image(index), image.astype(np.uint16, copy=False)))
            else:
                split.image(index)[:] = image
        return split

    def finish(self, bits: int | None) -> int | None:
        """Scale the 16-bit grey images to 8 bits.

        Args:
            bits: significant bits; None for the bits of the largest value of all images.

        Returns:
            The significant bits, or None if there are no such images.
        """
        if not self.deep:
            return None
        bits = bits or max(8, max(int(image.max()).bit_length() for _, image in self.deep))
        for place, image in self.deep:
            place[:] = scaled(image, bits)
        self.deep.clear()
        return bits


def _decode(pair: Pair) -> tuple[NDArray[np.uint8] | NDArray[np.uint16], Raw] | InputError:
    try:
        return read_image(pair.image), read_mask(pair.mask)
    except InputError as error:
        return error


def _sizes(pairs: Sequence[Pair]) -> dict[Pair, Size]:
    """Height and width of each image in pixels, checked against its mask."""
    faults, found = [], {}
    for pair, outcome in zip(pairs, _in_threads(_size, pairs), strict=True):
        if isinstance(outcome, InputError):
            faults.append(outcome)
            continue
        (height, width), (rows, columns) = outcome
        if (height, width) != (rows, columns):
            faults.append(
                InputError(
                    f"--data: {pair.image} is {width}x{height} pixels, its mask {columns}x{rows}; expected "
                    f"equal sizes (as the EXIF orientation turns them)"
                )
            )
        found[pair] = height, width
    _raise(faults)
    return found


def _size(pair: Pair) -> tuple[Size, Size] | InputError:
    try:
        return image_size(pair.image), image_size(pair.mask)
    except InputError as error:
        return error


def _in_threads(function: Callable[[T], U], items: Sequence[T]) -> Iterable[U]:
    """The results of `function` in order; at most `READERS` of them are in memory."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(items), READERS):
            yield from pool.map(function, items[start : start + READERS])


def _raise(faults: list[InputError]) -> None:
    """Raise one error for all faults, if there are any."""
    if faults:
        texts = [str(fault).removeprefix("--data: ") for fault in faults]
        raise InputError(f"--data: {listing(texts)}")


def _check_memory(sizes: Collection[Size]) -> None:
    needed = BYTES * sum(height * width for height, width in sizes)
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return  # the system does not report its memory
    if needed > there:
        raise InputError(
            f"--data: {len(sizes)} images take {needed / 1e9:.1f} GB in memory, this machine has "
            f"{there / 1e9:.1f} GB; expected fewer or smaller images"
        )


def _warnings(data: Data, settings: Settings) -> list[str]:
    notes = []
    counts, names = data.train.pixel_counts(settings.classes), data.class_names(settings.classes)
    missing = [f"{index} ({names[index]})" for index in np.flatnonzero(counts == 0)]
    if missing:
        notes.append(f"no training mask has the class {', '.join(missing)}")
    if not counts.any():
        raise InputError("--data: all training masks are void; expected pixels of classes")
    small = data.train.smaller_than(settings.crop)
    if small:
        notes.append(
            f"{small} of {len(data.train)} training images are smaller than the crop of {settings.crop} "
            f"pixels: they are padded with void"
        )
    return notes
