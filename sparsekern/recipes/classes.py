"""Files with the names of classes and their values or colours in masks."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.recipes.data import VOID
from sparsekern.recipes.errors import InputError

FILES = ("classes.csv", "classes.json", "classes.txt", "class_dict.csv")
VOID_NAMES = ("void", "ignore", "unlabeled", "unlabelled")


@dataclass(frozen=True)
class ClassTable:
    """Names of classes, and their values or colours in masks if these are not the class indices.

    Attributes:
        names: names of the classes, background first.
        values: class index or `VOID`, by grey value.
        colours: class index or `VOID`, by red * 65536 + green * 256 + blue.
    """

    names: tuple[str, ...]
    values: dict[int, int]
    colours: dict[int, int]


def find_table(folder: Path) -> Path | None:
    """The file of classes in a folder of data; None if there is none.

    Raises:
        InputError: there are several such files.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(
            f"--data: {folder} has {' and '.join(path.name for path in found)}; expected one of them, or "
            f"--classes-file"
        )
    return found[0] if found else None


def load_table(path: Path) -> ClassTable:
    """Read a file of classes: one name per line (.txt), a table (.csv), or a list or object (.json).

    Raises:
        InputError: the file cannot be read or has other content; the error names the path.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            rows = _json_rows(json.loads(text))
        elif path.suffix.lower() == ".csv":
            rows = _csv_rows(text)
        else:
            rows = [(line.strip(), None, None) for line in text.splitlines() if line.strip()]
        return _table(rows)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, csv.Error) as error:
        raise InputError(
            f"--classes-file: {path} cannot be used ({error}); expected a name a line, a CSV table with the "
            f"columns name and value, color, or r,g,b, or a JSON list of names"
        ) from error


Row = tuple[str, int | None, int | None]  # name, value, colour


def _table(rows: list[Row]) -> ClassTable:
    names: list[str] = []
    values: dict[int, int] = {}
    colours: dict[int, int] = {}
    for name, value, colour in rows:
        coded = value is not None or colour is not None
        void = coded and name.lower() in VOID_NAMES
        for known, key in ((values, value), (colours, colour)):
            if key is not None:
                if key in known:
                    raise ValueError(f"{name!r} has the value or colour of another class")
                known[key] = VOID if void else len(names)
        if not void:
            if name in names:
                raise ValueError(f"the name {name!r} comes twice")
            names.append(name)
    if len(names) < 2:
        raise ValueError(f"it names {len(names)} classes, expected at least 2 with the background")
    for known in (values, colours):
        if known and len(set(known.values()) - {VOID}) != len(names):
            raise ValueError("some classes have a value or colour and others have none")
    return ClassTable(tuple(names), values, colours)


def _csv_rows(text: str) -> list[Row]:
    head = text.split("\n", 1)[0]
    delimiter = next((mark for mark in (",", ";", "\t") if mark in head), ",")
    rows = []
    for record in csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True):
        named = {
            (key or "").strip().lower(): (value or "") for key, value in record.items() if key is not None
        }
        if "name" not in named:
            raise ValueError(f"its columns are {', '.join(named)}, without name")
        rows.append(_named(named))
    return rows


def _json_rows(content: Any) -> list[Row]:
    if isinstance(content, list) and all(isinstance(entry, str) for entry in content):
        return [(name, None, None) for name in content]
    if isinstance(content, list) and all(isinstance(entry, dict) and "name" in entry for entry in content):
        return [_named(entry) for entry in content]
    if isinstance(content, dict) and content:
        if all(isinstance(value, str) and key.isdecimal() for key, value in content.items()):
            ordered = sorted(content.items(), key=lambda item: int(item[0]))
            if [int(key) for key, _ in ordered] == list(range(len(ordered))):
                return [(name, None, None) for _, name in ordered]
            return [(name, int(key), None) for key, name in ordered]
        if all(type(value) is int for value in content.values()):
            return [(name, value, None) for name, value in content.items()]
        return [(name, None, _colour(value)) for name, value in content.items()]
    raise ValueError("it is neither a list of names nor an object of names or colours")


def _named(entry: dict[str, Any]) -> Row:
    value = entry.get("value", "")
    colour = entry.get("color", entry.get("colour", ""))
    if colour in ("", None) and all(str(entry.get(key, "")).strip() for key in "rgb"):
        colour = [entry[key] for key in "rgb"]
    number = None if value in ("", None) else int(value)
    return str(entry["name"]).strip(), number, None if colour in ("", None) else _colour(colour)


def _colour(value: Any) -> int:
    """A colour from `[r, g, b]`, `"#rrggbb"` or `"r g b"`."""
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch("#[0-9a-fA-F]{6}", text):
            return int(text[1:], 16)
        value = text.replace(",", " ").split()
    parts = [str(part).strip() for part in value] if isinstance(value, list) else []
    if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
        raise ValueError(f"{value!r} is no colour such as [255, 0, 0] or #ff0000")
    red, green, blue = map(int, parts)
    return red * 65536 + green * 256 + blue
