"""Resuming a run: the arguments in its checkpoint, and the check of new arguments against them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.recipes.checkpoint import load_checkpoint
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.files import CHECKPOINT, RUN
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import PREFIX

# Arguments beside the settings that a resumed run takes over.
REMEMBERED = ("data", "classes_file", "backbone", "threads", "checkpoint_every")
PATHS = ("data", "classes_file", "backbone")


@dataclass(frozen=True)
class Saved:
    """A run that can be resumed.

    Attributes:
        path: the checkpoint of the run.
        state: the content of the checkpoint, see `Trainer.state_dict`.
        settings: the settings of the run.
        remembered: the other arguments, by the names in `REMEMBERED`; paths are absolute.
    """

    path: Path
    state: Mapping[str, Any]
    settings: Settings
    remembered: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The directory of the run."""
        return self.path.parent

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return int(self.state["step"])

    def concluded(self, steps: int) -> bool:
        """Whether `steps` steps are completed and the results are written."""
        return self.step >= steps and (self.folder / RUN).exists()

    def fill(self, parameters: Mapping[str, Any], given: Set[str]) -> dict[str, Any]:
        """Replace the arguments that the user did not give by those of the run.

        Args:
            parameters: arguments of the command.
            given: names of the arguments that the user gave.

        Raises:
            InputError: `backbone` is given and differs from the run's.
        """
        own = self.settings.to_json() | dict(self.remembered)
        filled = {
            name: value if name in given or name not in own else own[name]
            for name, value in parameters.items()
        }
        for name in PATHS:
            if filled.get(name) is not None:
                filled[name] = Path(filled[name])
        if not given & {"dense", "keep"}:
            filled["dense"] = self.settings.keep is None
        if filled.get("dense") and "keep" not in given:
            filled["keep"] = None
        if "out" not in given:
            filled["out"] = self.folder
        if "backbone" in given and _absolute(filled["backbone"]) != self.remembered.get("backbone"):
            raise InputError(
                f"--backbone: got {filled['backbone']} with --resume of a run that began with "
                f"{self.remembered.get('backbone')}; expected none, the weights are in the checkpoint"
            )
        return filled


def open_run(path: Path) -> Saved:
    """Read the run in a directory or a checkpoint.

    Raises:
        InputError: there is no run, or its checkpoint cannot be read.
    """
    if path.is_dir():
        if not (path / CHECKPOINT).is_file():
            raise InputError(f"--resume: {path} holds no {CHECKPOINT}; expected the directory of a run")
        path = path / CHECKPOINT
    state = load_checkpoint(path)
    for name, kind in (("settings", dict), ("step", int)):
        if not isinstance(state.get(name), kind):
            raise InputError(f"--resume: {path} lacks {name!r}; expected a checkpoint of a run")
    known = state.get("remembered")
    return Saved(path, state, Settings.from_json(state["settings"]), known if isinstance(known, dict) else {})


def remember(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a resumed run takes over, as plain data."""
    kept = {name: arguments[name] for name in REMEMBERED if name in arguments}
    return {name: _absolute(value) if name in PATHS else value for name, value in kept.items()}


def check_data(path: Path | None, saved: Saved | None, given: bool) -> Path:
    """The folder or list with the images of a run.

    Args:
        path: path from the arguments or from the resumed run.
        saved: the resumed run, or None.
        given: whether the user gave the path.

    Raises:
        InputError: there is no path, or the path of the resumed run does not exist any more.
    """
    if path is None:
        rest = "" if saved is None else f", as {saved.path} remembers none"
        raise InputError(
            f"--data: got none, expected a folder or a CSV list of images and masks{rest}"
            + (" (or --resume RUN)" if saved is None else "")
        )
    if not _is_generated(path) and not path.exists() and saved is not None and not given:
        raise InputError(
            f"--data: {path}, which {saved.path} remembers, does not exist; expected --data with the place "
            f"where the images are now"
        )
    return path


def check_settings(mine: Settings, theirs: Settings) -> None:
    """Check that the settings `mine` equal those of the resumed run, `theirs`, except for more steps.

    Raises:
        InputError: a setting differs; the error names the argument.
    """
    here, there = mine.to_json(), theirs.to_json()
    for name, value in here.items():
        if value != there[name] and not (name == "steps" and value > there[name]):
            expected = "that number or more" if name == "steps" else "equal arguments"
            raise InputError(
                f"--resume: the checkpoint is of a run with --{name.replace('_', '-')} "
                f"{there[name]}, this one has {value}; expected {expected}"
            )


def _absolute(path: Path | str | None) -> str | None:
    if path is None or _is_generated(path):
        return None if path is None else str(path)
    return str(Path(path).absolute())


def _is_generated(path: Path | str) -> bool:
    return str(path).startswith(PREFIX)
