"""Options of `train` that are fields of `Settings`, and `Settings` from what the user gave."""

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

# Where a value comes from; the higher one wins where two options exclude each other.
_RANKS = {"COMMANDLINE": 2, "ENVIRONMENT": 2, "PROMPT": 2, "DEFAULT_MAP": 1}

# What the command line leaves open until it knows whether the training is a dense one, and whether a file
# names the classes.
_OPEN = ("keep", "classes")


def with_settings(command: Command) -> Command:
    """Gives a command that takes `**settings` an option for every field of `Settings`, with its default."""
    signature = inspect.signature(command, eval_str=True)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    # typer takes options by name, whatever their order: that of the help.
    required = [p for p in kept if p.default is inspect.Parameter.empty]
    optional = [p for p in kept if p.default is not inspect.Parameter.empty]
    hints = get_type_hints(Settings)
    options = [_option(entry, hints[entry.name]) for entry in fields(Settings)]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*required, *options, *optional]
    )
    return command


def _option(entry: Field[Any], hint: Any) -> inspect.Parameter:
    # What has a parser of its own comes as a text.
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
    """2 for an option that was given on the command line, 1 for one of the config file, 0 for a default."""
    source = context.get_parameter_source(name)
    return 0 if source is None else _RANKS.get(source.name, 0)


def given(context: typer.Context) -> set[str]:
    """Names of the options that the user gave, on the command line or in the config file."""
    return {name for name in context.params if rank(context, name)}


def settings_of(context: typer.Context, arguments: Mapping[str, Any]) -> Settings:
    """The settings that the options of a command make.

    `--epochs` leaves its `steps` to :func:`steps_of`, when the number of images is known.

    Args:
        context: says where an option comes from.
        arguments: the options; those that were not given may come from a run to go on with.

    Raises:
        InputError: an option is out of range, or two exclude each other.
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
    """Optimizer steps: `--steps`, or as many as show `images` training images `--epochs` times.

    Raises:
        InputError: both are given, or a number below 1.
    """
    epochs = context.params["epochs"]
    if not _wins(context, context.params, "epochs", "steps", epochs is not None):
        return settings.steps
    return -(-epochs * images // settings.batch)


def check_epochs(context: typer.Context) -> None:
    """What `steps_of` would refuse, before any data is read."""
    epochs = context.params["epochs"]
    if epochs is not None and epochs < 1:
        raise InputError(f"--epochs: got {epochs}, expected a whole number, at least 1")
    _wins(context, context.params, "epochs", "steps", epochs is not None)


def _wins(context: typer.Context, values: Mapping[str, Any], name: str, other: str, wanted: Any) -> bool:
    """Whether option `name`, which excludes `other`, is in force: the command line beats a config file.

    Raises:
        InputError: both are given in the same place.
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
    """The Pruner's warmup under its present name, or under that of earlier versions."""
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
