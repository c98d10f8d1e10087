"""The application of all commands, with their common options and helpers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import sparsekern
from sparsekern.recipes.errors import Stopped

app = typer.Typer(
    name="sparsekern",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# Markup is off, as texts contain paths and shapes with brackets.
console = Console(highlight=False, markup=False)

Threads = Annotated[int, typer.Option(help="CPU threads; 0 for torch's choice.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors and warnings alone.")]
Out = Annotated[Path, typer.Option(help="Directory of the results.")]
ClassesFile = Annotated[
    Path | None, typer.Option(help="Names (values, colours) of the classes; .txt, .csv or .json.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps")]


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(args=list(arguments), prog_name="sparsekern", standalone_mode=False)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        return _fail("stopped", 130)
    except Stopped as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.code
    except Exception as error:
        # Usage errors of typer and of click have this method; their classes differ between versions.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Channel pruning while training."""
    if version:
        sys.stdout.write(f"sparsekern {sparsekern.__version__}\n")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    sys.stderr.write(f"warning: {' '.join(message.split())}\n")


def set_threads(threads: int) -> None:
    """Set the number of CPU threads of torch; 0 leaves it unchanged.

    Raises:
        ValueError: ``threads`` is negative.
    """
    if threads < 0:
        raise ValueError(f"--threads: got {threads}, expected 0 or more")
    if threads:
        torch.set_num_threads(threads)


def set_quiet(quiet: bool) -> None:
    """Turn the output of `console` off or on."""
    console.quiet = quiet


def number_or_text(text: str) -> int | str:
    """A whole number as int, any other text unchanged; the Pruner checks it."""
    return int(text) if text.isdecimal() else text


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code
