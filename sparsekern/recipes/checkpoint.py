"""Checkpoints: complete or absent on the disk, and read without running code from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import read_plain, replacing
from .errors import InputError

FORMAT = "sparsekern checkpoint 1"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state` (tensors and plain data); a process killed meanwhile leaves the old file."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "state": dict(state)}, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote.

    Raises:
        InputError: the file is missing, truncated, or something else.
    """
    content = _load(path, "--resume", "a checkpoint.pt of a run")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"--resume: {path} is no checkpoint of a run; expected a checkpoint.pt")
    state = content["state"]
    assert isinstance(state, dict)
    return state


def load_backbone(path: Path) -> dict[str, Tensor]:
    """Reads a state dict, as `torch.save` writes it.

    Raises:
        InputError: the file is missing, truncated, or something else.
    """
    content = _load(path, "--backbone", "a state dict of torchvision's")
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"--backbone: {path} is no state dict; expected one of torchvision's")
    return content


def _load(path: Path, argument: str, expected: str) -> Any:
    if not path.is_file():
        raise InputError(f"{argument}: {path} is no file; expected {expected}")
    try:
        return read_plain(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{argument}: {path} cannot be read ({error}); expected {expected}") from error
