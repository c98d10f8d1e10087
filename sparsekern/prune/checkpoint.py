"""A whole training in one file: model, optimizer, Pruner, random numbers, and what the user adds."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsekern._files import read_plain, replacing, target

FORMAT = "sparsekern.checkpoint"
VERSION = 1

_ENTRIES = ("classes", "model", "optimizer", "pruner", "also", "random", "activations", "extra")


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write the entries of a checkpoint, as a whole or not at all.

    Raises:
        OSError: ``path`` cannot be written.
        ValueError: something of ``extra`` could not be read back without running code.
    """
    destination = target(path)
    for name, value in content["extra"].items():
        _check_plain(name, value)
    try:
        with replacing(destination) as temporary:
            torch.save({"format": FORMAT, "version": VERSION, **content}, temporary)
    except OSError as error:
        raise OSError(f"path: cannot write {os.fspath(path)!r}: {error}") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The entries of a checkpoint.

    Raises:
        OSError: ``path`` cannot be read.
        ValueError: the file is truncated, damaged, or no checkpoint.
    """
    content = read_plain(path)
    where = f"path: {os.fspath(path)!r}"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{where} was not written by Pruner.save_checkpoint")
    if content.get("version") != VERSION:
        raise ValueError(f"{where} has format version {content.get('version')!r}, expected {VERSION}")
    missing = [name for name in _ENTRIES if name not in content]
    if missing:
        raise ValueError(f"{where} has no entry {missing[0]!r}, expected a checkpoint of this version")
    return content


def classes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What a checkpoint is of; an optimizer of ours and torch's of that name read each other's state."""
    return {"model": type(model).__qualname__, "optimizer": type(optimizer).__qualname__}


def check(
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    also: Sequence[nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Everything of a checkpoint fits; ``shapes`` are those that the model's tensors will have.

    Raises:
        ValueError: something does not.
    """
    for kind, name in classes(model, optimizer).items():
        if content["classes"].get(kind) != name:
            raise ValueError(f"checkpoint: its {kind} is {content['classes'].get(kind)}, expected {name}")
    _check_tensors(content["model"], model, shapes)
    theirs = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(f"checkpoint: of an optimizer with groups of {theirs} parameters, expected {ours}")
    if len(content["also"]) != len(also):
        raise ValueError(
            f"checkpoint: with {len(content['also'])} copies of the model, expected {len(also)} as given to "
            f"the Pruner as also="
        )


def _check_tensors(state: Mapping[str, Any], model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = model.state_dict(keep_vars=True)
    differing = sorted(state.keys() ^ expected.keys())
    if differing:
        raise ValueError(f"checkpoint: of another network, {differing[0]!r} is in one of the two only")
    for name, value in state.items():
        shape = shapes.get(name)
        if shape is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"checkpoint: of another network, {name!r} has shape {list(value.shape)}, "
                f"expected {list(shape)}"
            )


def random_state(model: nn.Module) -> dict[str, Any]:
    """The state of all generators that a training usually draws from, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _devices(model)],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], model: nn.Module) -> None:
    """Go on drawing where :func:`random_state` was taken."""
    torch.set_rng_state(state["torch"])
    for own, device in zip(state["cuda"], _devices(model), strict=False):
        torch.cuda.set_rng_state(own, device)
    key = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def restored_by(undo: ExitStack, modules: Iterable[nn.Module], optimizer: Optimizer) -> None:
    """Tell ``undo`` what restores the weights, the optimizer's state and the generators as they are now.

    ``modules`` are the model and copies of it, the first one is the model.
    """
    kept = tuple(modules)
    undo.callback(set_random_state, random_state(kept[0]), kept[0])
    # Loading gives an optimizer another state and other groups; those from before are not written to.
    undo.callback(optimizer.__setstate__, {"state": optimizer.state, "param_groups": optimizer.param_groups})
    for module in kept:
        undo.callback(module.load_state_dict, _copied(module.state_dict()))


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pytree.tree_map_only(Tensor, Tensor.clone, value) for name, value in state.items()}


def _check_plain(name: str, value: Any) -> None:
    """``value`` would come back: its tensors always do, so only the rest is tried."""
    rest = pytree.tree_map_only(Tensor, lambda _: torch.empty(0), value)
    memory = io.BytesIO()
    try:
        torch.save(rest, memory)
        memory.seek(0)
        torch.load(memory, weights_only=True)
    except (pickle.PickleError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: got {type(value).__name__}, expected tensors and plain values (a state_dict): "
            f"{str(error).splitlines()[0]}"
        ) from None


def _devices(model: nn.Module) -> list[torch.device]:
    # Asking any other GPU for its generator would take memory on it.
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
