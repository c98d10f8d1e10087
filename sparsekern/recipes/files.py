"""Output directories of runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sparsekern.recipes.errors import InputError

MODEL, CHECKPOINT, RUN = "model.safetensors", "checkpoint.pt", "run.json"


def check_writable(path: Path, argument: str) -> None:
    """Check that files can be written in directory `path`, and remove directories created for the check.

    Raises:
        InputError: the directory cannot be created or written; the error names `argument`.
    """
    made: list[Path] = []
    try:
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{argument} {path} cannot be written ({reason}); expected a directory to write to"
        ) from error
    finally:
        for folder in reversed(made):
            folder.rmdir()


def check_free(path: Path, argument: str) -> None:
    """Refuse a directory that holds a run, so that no run is overwritten.

    Raises:
        InputError: the directory holds a run; the error says how to resume or replace it.
    """
    if any((path / name).exists() for name in (RUN, MODEL)):
        state = "finished"
    elif (path / CHECKPOINT).exists():
        state = "stopped"
    else:
        return
    raise InputError(
        f"{argument}: got {path}, which holds a {state} run; expected another directory, "
        f"--resume {path} to go on with it, or --overwrite to replace it"
    )


def begin_results(path: Path, overwrite: bool) -> None:
    """Make directory `path` for the results of a run; with `overwrite`, delete the results of another run."""
    path.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in (RUN, MODEL, CHECKPOINT):
            (path / name).unlink(missing_ok=True)
