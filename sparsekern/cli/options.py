"""Options of `train` for the fields of `Settings`, and `Settings` from the options of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from sparsekern.cli.app import warn
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

# Rank of the source of a value; the higher rank wins where two options exclude each other.
_RANKS = {"COMMANDLINE": 2, "ENVIRONMENT": 2, "PROMPT": 2, "DEFAULT_MAP": 1}

# Options whose default depends on other options: on --dense, and on the number of classes in the data.
_OPEN = ("keep", "classes")


def with_settings(command: Command) -> Command:
    """Give a command with `**` arguments an option for every field of `Settings`, with its default."""
    signature = inspect.signature(command, eval_str=True)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    # typer passes options by name, so their order only determines the order of the help.
    required = [p for p in kept if p.default is inspect.Parameter.empty]
    optional = [p for p in kept if p.default is not inspect.Parameter.empty]
    hints = get_type_hints(Settings)
    options = [_option(entry, hints[entry.name]) for entry in fields(Settings)]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*required, *options, *optional]
    )
    return command


def _option(entry: Field[Any], hint: Any) -> inspect.Parameter:
    # A field with its own parser is passed as text.
    annotation = hint if entry.metadata["parse"] is None else str | None
    is_open = entry.name in _OPEN
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None if is_open else entry.default,
        annotation=Annotated[
            annotation | None if is_open else annotation, typer.Option(help=entry.metadata["help"])
        ],
    )


def rank(context: typer.Context, name: str) -> int:
    """The source of an option: 2 for the command line, 1 for the config file, 0 for a default."""
    source = context.get_parameter_source(name)
    return 0 if source is None else _RANKS.get(source.name, 0)


def given(context: typer.Context) -> set[str]:
    """Names of the options on the command line or in the config file."""
    return {name for name in context.params if rank(context, name)}


def settings_of(context: typer.Context, arguments: Mapping[str, Any]) -> Settings:
    """The settings from the options of a command.

    `--epochs` is not applied here: :func:`steps_of` does it when the number of images is known.

    Args:
        context: context of the command, with the source of each option.
        arguments: the options; options that were not given may come from a resumed run.

    Raises:
        InputError: an option is out of range, or two options exclude each other.
    """
    values = dict(arguments)
    values["warmup"] = _warmup(context, values)
    if _wins(context, values, "dense", "keep", values["dense"]):
        values["keep"] = None
        if _wins(context, values, "dense", "shrink", values["shrink"]):
            values["shrink"] = False
    elif values["keep"] is None:
        values["keep"] = Settings.keep
    if values["classes"] is None:
        values["classes"] = Settings.classes
    for entry in fields(Settings):
        parse, value = entry.metadata["parse"], values[entry.name]
        if parse is not None and isinstance(value, str):
            values[entry.name] = parse(value)
    return Settings(**{entry.name: values[entry.name] for entry in fields(Settings)})


def steps_of(context: typer.Context, settings: Settings, images: int) -> int:
    """Number of optimizer steps: `--steps`, or the steps of `--epochs` passes over `images` training images.

    Raises:
        InputError: both options are given.
    """
    epochs = context.params["epochs"]
    if not _wins(context, context.params, "epochs", "steps", epochs is not None):
        return settings.steps
    return -(-epochs * images // settings.batch)


def check_epochs(context: typer.Context) -> None:
    """Check `--epochs` before any data is read.

    Raises:
        InputError: the number is below 1, or `--steps` is given in the same place.
    """
    epochs = context.params["epochs"]
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs: got {epochs}, expected a whole number, at least 1")
    _wins(context, context.params, "epochs", "steps", epochs is not None)


def _wins(context: typer.Context, values: Mapping[str, Any], name: str, other: str, wanted: Any) -> bool:
    """Whether option `name` is in force. It excludes `other`; the command line overrides a config file.

    Raises:
        InputError: both options are given in the same place.
    """
    mine, theirs = rank(context, name), rank(context, other)
    value = values[other]
    if not wanted or (mine < theirs and value):
        return False
    if mine == theirs and value:
        got = "it" if value is True else value
        raise InputError(f"--{other}: got {got} with --{name}, expected one of the two")
    return True


def _warmup(context: typer.Context, values: Mapping[str, Any]) -> float:
    """The warmup of the Pruner, from `--warmup` or from its deprecated name `--begin`."""
    begin, warmup = values["begin"], values["warmup"]
    if begin is not None:
        if rank(context, "warmup"):
            raise InputError(f"--begin: got {begin} with --warmup {warmup}, expected --warmup alone")
        warn("--begin is deprecated and goes with the next version: it is called --warmup now, as in Pruner")
        return begin
    if rank(context, "warmup") and not rank(context, "lr_warmup"):
        warn(
            "--warmup is the Pruner's since this version: the share of the steps before the first channel "
            "goes. The learning rate's is --lr-warmup; giving that, too, silences this warning"
        )
    return warmup
