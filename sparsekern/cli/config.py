"""Options of a command from a file; options on the command line override them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.recipes.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _use(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of the file the defaults of the command."""
    if path is not None:
        known = {str(parameter.name) for parameter in context.command.params} - {"config"}
        context.default_map = read_config(path, known)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        help="Options from a file (.toml, .json, .yaml); those on the line win.",
        callback=_use,
        is_eager=True,
    ),
]


def read_config(path: Path, known: Set[str]) -> dict[str, Any]:
    """Read options from a file, for the `default_map` of a command.

    Args:
        path: a file with one table, whose keys are option names without the leading dashes.
        known: names of the options in Python.

    Returns:
        The options by their names in Python. Values are texts, so the command parses and checks them as on
        the command line. Switches are booleans. An option with the value null (JSON, YAML) is left out.

    Raises:
        InputError: the file cannot be read, has an unknown or repeated key, or has a value of another type.
    """
    options: dict[str, Any] = {}
    for key, value in _table(path).items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in known:
            names = ", ".join(sorted(name.replace("_", "-") for name in known))
            raise InputError(f"--config: {path} has {key!r}, expected one of {names}")
        if name in options:
            raise InputError(f"--config: {path} has {key!r} in two spellings, expected one")
        if value is None:
            continue
        if not isinstance(value, (bool, int, float, str)):
            raise InputError(
                f"--config: {path} has {type(value).__name__} for {key!r}, expected a number, a text or "
                "a switch"
            )
        options[name] = value if isinstance(value, bool) else str(value)
    return options


def _table(path: Path) -> Mapping[Any, Any]:
    ending = path.suffix.lower()
    readers: Mapping[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": _yaml,
        ".yml": _yaml,
    }
    if ending not in readers:
        raise InputError(f"--config: got {path}, expected a file that ends in {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--config: {path} cannot be read ({error.strerror}), expected a file") from None
    except UnicodeDecodeError:
        raise InputError(f"--config: {path} is no text, expected {ending[1:]} in UTF-8") from None
    try:
        table = readers[ending](text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config: {path} is not valid {ending[1:]}: {error}") from None
    if not isinstance(table, dict):
        raise InputError(f"--config: {path} holds {type(table).__name__}, expected a table of options")
    return table


def _yaml(text: str) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise InputError(
            "--config: got YAML, which needs PyYAML; run pip install pyyaml, or use TOML or JSON"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
