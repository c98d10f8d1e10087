"""Checkpoints: written atomically, and read without running code from the file."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekern.files.atomic import has_checksums, read_plain, replacing, save_plain
from sparsekern.files.schema import (
    NOTHING,
    PLAIN,
    TEXT,
    Anything,
    Either,
    Entries,
    Fields,
    Items,
    Kind,
    Whole,
)
from sparsekern.prune.save.generators import GENERATORS
from sparsekern.prune.save.schema import OPTIMIZER
from sparsekern.prune.state.schema import STATE
from sparsekern.recipes.errors import InputError

FORMAT = "sparsekern checkpoint 1"

# Losses and scores may be non-finite, as in a diverged run.
_NUMBER = Either((Kind(float), Whole()))

RUN = Fields(
    {
        "settings": Entries(TEXT, PLAIN),
        "shapes": Entries(TEXT, Items(Whole(0))),
        "data": Items(Whole(0)),
        "step": Whole(0),
        "model": Entries(TEXT, Anything()),
        "optimizer": OPTIMIZER,
        "scheduler": Entries(TEXT, Anything()),
        "scaler": Entries(TEXT, Either((Kind(float), Whole(0)))),
        "pruner": Either((NOTHING, STATE)),
        "random": GENERATORS.required["torch"],
        "history": Entries(TEXT, Items(Either((_NUMBER, Items(_NUMBER))))),
    },
    {"remembered": Entries(TEXT, PLAIN)},
    others=Anything(),
)
"""Schema of the state of a `Trainer` with any network."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain data). A process killed meanwhile leaves the old file intact."""
    with replacing(path) as temporary:
        save_plain({"format": FORMAT, "state": dict(state)}, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint`.

    Raises:
        InputError: the file is missing, truncated, changed, or of another kind.
    """
    content = _load(path, "--resume", "a checkpoint.pt of a run")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"--resume: {path} is not a checkpoint of a run; expected a checkpoint.pt")
    state = content.get("state")
    if not isinstance(state, dict) or content.keys() != {"format", "state"}:
        raise InputError(f"--resume: {path} is damaged or was changed; expected a checkpoint.pt of a run")
    return state


def load_backbone(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote.

    Files in the format before torch 1.6 hold no checksums. If such a file has a part of its SHA-256 in its
    name, as torch.hub's files do (`-8738ca79.pth`), it is checked against that part. Otherwise there is a
    warning.

    Raises:
        InputError: the file is missing, truncated, changed, or of another kind.
    """
    content = _load(path, "--backbone", "a state dict of torchvision's", legacy=True)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise InputError(f"--backbone: {path} is not a state dict; expected one of torchvision's")
    if not has_checksums(path) and not _has_its_name(path):
        warnings.warn(
            f"--backbone: got {path} in the format that torch wrote before 1.6, expected one with checksums, "
            f"which show damage; write it again with torch.save",
            stacklevel=2,
        )
    return content


def _has_its_name(path: Path) -> bool:
    """Whether the SHA-256 of the file begins with the hexadecimal digits at the end of its name."""
    found = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    if found is None:
        return False
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest().startswith(found[1])


def _load(path: Path, argument: str, expected: str, *, legacy: bool = False) -> Any:
    if not path.is_file():
        raise InputError(f"{argument}: {path} is not a file; expected {expected}")
    try:
        return read_plain(path, legacy=legacy)
    except (OSError, ValueError) as error:
        raise InputError(f"{argument}: {path} cannot be read ({error}); expected {expected}") from error
