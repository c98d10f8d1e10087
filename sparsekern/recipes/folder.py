"""Finding the images and masks of each split in a folder or a CSV list."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsekern.recipes.errors import InputError, listing
from sparsekern.recipes.images import EXTENSIONS

LAYOUT = (
    "DIR/{train,val,test}/{images,masks}/NAME.png, DIR/{images,masks}/NAME.png, or a CSV list with the "
    "columns image, mask, split"
)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
IMAGES, MASKS = ("images", "image", "imgs", "img"), ("masks", "mask", "labels", "label", "annotations", "gt")

# Files and folders that other programs leave in a folder.
HIDDEN = ("thumbs.db", "desktop.ini", "__macosx")

# Prefixes and suffixes that distinguish the names of masks and images.
MASK_WORDS = "masks?|gt|groundtruth|labels?|seg|segmentation|annotations?"
IMAGE_WORDS = "images?|img"

# Key of the random stream of the split, independent of the streams of batches.
_DEAL = 2


@dataclass(frozen=True, order=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path


Pairs = dict[str, list[Pair]]  # by split
Dealt = dict[str, list[Pair] | None]  # train, val, test


def find_pairs(root: Path) -> Pairs:
    """The images and masks of a folder or a CSV list, by split; pairs without a split are under "".

    Raises:
        InputError: there are no images, an image has no mask or a mask no image, or a file is not an image;
            the error names the first few files.
    """
    if root.is_file():
        return read_list(root)
    if not root.is_dir():
        raise InputError(f"--data: {root} is not a folder; expected the layout {LAYOUT}")
    named = {split: _child(root, names) for split, names in SPLITS.items()}
    folders = {split: folder for split, folder in named.items() if folder is not None}
    if folders:
        found = {split: (_need(folder, IMAGES), _need(folder, MASKS)) for split, folder in folders.items()}
    else:
        images, masks = _need(root, IMAGES), _need(root, MASKS)
        inner = {split: _child(images, names) for split, names in SPLITS.items()}
        found = {
            split: (folder, _need(masks, SPLITS[split]))
            for split, folder in inner.items()
            if folder is not None
        }
        if not found:
            return {"": pair_up(images, masks)}
    if "train" not in found:
        raise InputError(f"--data: {root / 'train'} is not a folder; expected the layout {LAYOUT}")
    return {split: pair_up(*folders) for split, folders in found.items()}


def deal(pairs: Pairs, share: float, seed: int) -> tuple[Dealt, list[str]]:
    """Choose the pairs of missing splits at random.

    Without splits, validation and test each get `share` of the images. Without validation images, `share` of
    the training images are used for validation. Without test images, the validation images are also the test.

    Args:
        pairs: pairs by split; pairs without a split are under "".
        share: share of the images, in [0, 1).
        seed: seed of the random choice.

    Returns:
        The pairs of train, val (None without validation) and test, and a sentence on each choice.

    Raises:
        InputError: there are too few images.
    """
    if "" in pairs:
        return _deal_all(pairs[""], share, seed)
    given, val, test = pairs["train"], pairs.get("val"), pairs.get("test")
    if val is not None:
        notes = [] if test else ["no test images: the validation images are scored at the end, too"]
        return {"train": given, "val": val, "test": test or val}, notes
    if test is None and not share:
        raise InputError("--validation: got 0 for data of training images alone, expected a share above 0")
    if not share:
        return {"train": given, "val": None, "test": test}, ["no validation images: no scores while training"]
    count = max(1, round(share * len(given)))
    if count >= len(given):
        raise InputError(
            f"--data: got {len(given)} training images and no validation images, expected at least 2 to "
            f"split {share:.0%} off, or --validation 0"
        )
    order = _shuffled(given, seed)
    val, rest = _sorted(order[:count]), _sorted(order[count:])
    notes = [f"no val/: {count} of {len(given)} training images are for validation, by --seed {seed}"]
    if test is None:
        notes.append("no test images: the validation images are scored at the end, too")
    return {"train": rest, "val": val, "test": test or val}, notes


def _deal_all(everything: list[Pair], share: float, seed: int) -> tuple[Dealt, list[str]]:
    """Divide images without a split into all three splits."""
    parts = 3 if share else 2
    count = max(1, round((share or 0.1) * len(everything)))
    if len(everything) - (parts - 1) * count < 1:
        raise InputError(f"--data: got {len(everything)} images without splits, expected at least {parts}")
    order = _shuffled(everything, seed)
    test, rest = order[:count], order[count:]
    val, train = (rest[:count], rest[count:]) if share else ([], rest)
    note = (
        f"no splits in the data: {len(train)} images for training, {len(val)} for validation and "
        f"{len(test)} for test, dealt by --seed {seed}"
    )
    return {"train": _sorted(train), "val": _sorted(val) or None, "test": _sorted(test)}, [note]


def pair_up(images: Path, masks: Path) -> list[Pair]:
    """Pair the images of one folder with the masks of another folder by name, sorted.

    Raises:
        InputError: a file has no counterpart or several ones, or is not an image.
    """
    by_stem = {folder: _by_stem(folder) for folder in (images, masks)}
    left, right = by_stem[images], by_stem[masks]
    if not left and not right:
        raise InputError(f"--data: {images} is empty; expected the layout {LAYOUT}")
    both = left.keys() & right.keys()
    pairs = [Pair(left[stem], right[stem]) for stem in both]
    rest_left = {stem: path for stem, path in left.items() if stem not in both}
    rest_right = {stem: path for stem, path in right.items() if stem not in both}
    bare_left, bare_right = _bare(rest_left, IMAGE_WORDS), _bare(rest_right, MASK_WORDS)
    faults = []
    for name in sorted(bare_left.keys() | bare_right.keys()):
        ours, theirs = bare_left.get(name, []), bare_right.get(name, [])
        if len(ours) == len(theirs) == 1:
            pairs.append(Pair(ours[0], theirs[0]))
        elif ours and theirs:
            faults.append(
                f"{', '.join(map(str, ours + theirs))} belong together; expected one image and one mask"
            )
        else:
            alone, there = (ours, masks) if ours else (theirs, images)
            faults += [f"{path} has no counterpart, expected {there / path.name}" for path in alone]
    if faults:
        raise InputError(
            f"--data: {listing(faults)} ({len(left)} files in {images}, {len(right)} in {masks}; the "
            f"names of an image and its mask are equal apart from extension and a prefix or suffix, as _mask)"
        )
    return _sorted(pairs)


def read_list(path: Path) -> Pairs:
    """The pairs of a CSV file with the columns image, mask and optionally split.

    Paths are relative to the directory of the CSV file.

    Raises:
        InputError: the file cannot be read or lacks a column, a split is unknown, a file is missing, or an
            image occurs twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        head = text.split("\n", 1)[0]
        delimiter = next((mark for mark in (",", ";", "\t") if mark in head), ",")
        reader = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
        columns = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"--data: {path} cannot be read ({error}); expected a CSV list or a folder"
        ) from error
    if not {"image", "mask"} <= columns.keys():
        raise InputError(
            f"--data: {path} has the columns {', '.join(columns) or 'none'}; expected image, mask and, if "
            f"there are splits, split"
        )
    splits = {name: split for split, names in SPLITS.items() for name in names}
    pairs: Pairs = {}
    seen: dict[Path, int] = {}
    faults = []
    for line, row in rows:
        cells = {name: (row[column] or "").strip() for name, column in columns.items()}
        if not cells["image"] or not cells["mask"]:
            faults.append(f"line {line} lacks an image or a mask")
            continue
        split = splits.get(cells["split"].lower()) if "split" in columns else ""
        pair = Pair(path.parent / cells["image"], path.parent / cells["mask"])
        if split is None:
            faults.append(f"line {line} has the split {cells['split']!r}, expected train, val or test")
        elif pair.image in seen:
            faults.append(f"line {line} has {pair.image} again, after line {seen[pair.image]}")
        else:
            pairs.setdefault(split, []).append(pair)
        seen.setdefault(pair.image, line)
        faults += [
            f"line {line}: {file} does not exist" for file in (pair.image, pair.mask) if not file.is_file()
        ]
    if not faults and not pairs:
        faults.append("it has no rows")
    if not faults and not ("" in pairs or "train" in pairs):
        faults.append("it has no row of the split train")
    if faults:
        raise InputError(f"--data: {path}: {listing(faults)}")
    return {split: _sorted(found) for split, found in pairs.items()}


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    """The subfolder of `folder` with one of `names`, ignoring upper and lower case; None without one.

    Raises:
        InputError: there are several.
    """
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.lower() in names)
    if len(found) > 1:
        raise InputError(f"--data: {folder} has {' and '.join(p.name for p in found)}; expected one of them")
    return found[0] if found else None


def _need(folder: Path, names: Sequence[str]) -> Path:
    found = _child(folder, names)
    if found is None:
        raise InputError(f"--data: {folder / names[0]} is not a folder; expected the layout {LAYOUT}")
    return found


def _by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder by name without extension; hidden files are skipped.

    Raises:
        InputError: an entry is a folder, has another extension, or shares its name with another file.
    """
    found: dict[str, Path] = {}
    faults = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in HIDDEN:
            continue
        stem = unicodedata.normalize("NFC", path.stem)
        if path.is_dir():
            faults.append(f"{path} is a folder, expected images")
        elif path.suffix.lower() not in EXTENSIONS:
            faults.append(f"{path} is misnamed, expected NAME.png or another of {' '.join(EXTENSIONS)}")
        elif stem in found:
            faults.append(f"{path} and {found[stem].name} have the same name, expected one of them")
        else:
            found[stem] = path
    if faults:
        raise InputError(f"--data: {listing(faults)}")
    return found


def _bare(paths: Mapping[str, Path], words: str) -> dict[str, list[Path]]:
    """Paths by their names after removing a prefix or suffix in `words`."""
    affix = re.compile(rf"^(?:{words})[-_ .]|[-_ .](?:{words})$", re.IGNORECASE)
    found: dict[str, list[Path]] = {}
    for stem, path in paths.items():
        found.setdefault(affix.sub("", stem), []).append(path)
    return found


def _sorted(pairs: Sequence[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: str(pair.image))


def _shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    order = np.random.default_rng((seed, _DEAL)).permutation(len(pairs))
    return [pairs[int(index)] for index in order]
