"""A whole training in one file: model, optimizer, Pruner, random generators and the user's values."""

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

from sparsekern.files.atomic import read_plain, replacing, save_plain, target
from sparsekern.prune.state.content import (
    CHECKPOINT,
    FORMAT,
    METADATA,
    OPTIMIZER,
    VERSION,
    numpy_state,
    optimizer_rule,
    python_state,
    tensors_rule,
)

_PLAIN = (bool, int, float, str, type(None))

Shapes = Mapping[int, tuple[int, ...]]
"""Future shapes by ``id`` of tensors."""


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write the entries of a checkpoint completely, or write nothing.

    Raises:
        OSError: ``path`` cannot be written.
        ValueError: a value cannot be read back without running code. Nothing has been written.
    """
    target(path)
    # Schedulers leave NumPy numbers in an optimizer's groups, and loading those would run code.
    plain = dict(content)
    for name in ("optimizer", "extra"):
        plain[name] = pytree.tree_map_only(np.generic, lambda number: number.item(), plain[name])
    for name, value in plain["extra"].items():
        _check_plain(name, value)
    for name in ("optimizer", "also", "model"):
        leaves = pytree.tree_leaves(plain[name])
        if not all(isinstance(leaf, Tensor) or type(leaf) in _PLAIN for leaf in leaves):
            _check_plain(name, plain[name])
    with replacing(path) as temporary:
        save_plain({"format": FORMAT, "version": VERSION, **plain}, temporary)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint and check the form of its entries.

    Raises:
        OSError: ``path`` cannot be read.
        ValueError: the file is truncated, damaged, or not a checkpoint.
    """
    content = read_plain(path)
    where = f"path: {os.fspath(path)!r}"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{where} was not written by Pruner.save_checkpoint")
    if content.get("version") != VERSION:
        raise ValueError(f"{where} has format version {content.get('version')!r}, expected {VERSION}")
    try:
        CHECKPOINT.check(content, "checkpoint")
        for state in (content["model"], *content["also"]):
            METADATA.check(getattr(state, "_metadata", {}), "checkpoint['model']._metadata")
    except ValueError as error:
        raise ValueError(f"{where} is damaged or was changed: {error}") from None
    return content


def classes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Class names for a checkpoint; sparsekern's optimizers read the state of torch's of the same name."""
    return {"model": type(model).__qualname__, "optimizer": type(optimizer).__qualname__}


def check(
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    also: Sequence[nn.Module],
    shapes: Shapes,
) -> None:
    """Check that all of a checkpoint fits; ``shapes`` has the future shapes of ``model`` and ``also``.

    Raises:
        ValueError: an entry does not fit.
    """
    for kind, name in classes(model, optimizer).items():
        if content["classes"][kind] != name:
            raise ValueError(f"checkpoint: its {kind} is {content['classes'][kind]}, expected {name}")
    check_training(content["model"], content["optimizer"], model, optimizer, shapes)
    if len(content["also"]) != len(also):
        raise ValueError(
            f"checkpoint: with {len(content['also'])} copies of the model, expected {len(also)} as given to "
            f"the Pruner as also="
        )
    for index, (module, own) in enumerate(zip(also, content["also"], strict=True)):
        tensors_rule(module, shapes).check(own, f"checkpoint['also'][{index}]")
    for rank, state in enumerate(content["random"]):
        for own, device in zip(state["cuda"], _devices(model), strict=False):
            _check_generator(own, device, f"checkpoint['random'][{rank}]['cuda']")


def check_training(
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shapes: Shapes,
) -> None:
    """Check that ``model`` and ``optimizer`` can load ``weights`` and ``state`` at ``shapes``.

    Raises:
        ValueError: an entry does not fit; the text names it.
    """
    expected = model.state_dict(keep_vars=True)
    differing = sorted(weights.keys() ^ expected.keys())
    if differing:
        raise ValueError(f"checkpoint: of another network, {differing[0]!r} is in one of the two only")
    try:
        tensors_rule(model, shapes).check(weights, "checkpoint['model']")
    except ValueError as error:
        raise ValueError(f"{error}; the checkpoint is of another network or was changed") from None
    OPTIMIZER.check(state, "checkpoint['optimizer']")
    optimizer_rule(optimizer, state, shapes).check(state, "checkpoint['optimizer']")


def _check_generator(state: Tensor, device: torch.device, name: str) -> None:
    try:
        torch.Generator(device).set_state(state)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: got {list(state.shape)}, expected the state of a generator: {error}"
        ) from None


def in_own_memory(state: Any) -> Any:
    """``state`` with tensors that share no memory with each other.

    An optimizer keeps the tensors that it loads and writes to them. ``torch.save`` preserves views.
    """
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        alone = address not in seen and storage.nbytes() == tensor.numel() * tensor.element_size()
        seen.add(address)
        return tensor if alone or not tensor.numel() else tensor.clone()

    return pytree.tree_map_only(Tensor, own, state)


def random_state(model: nn.Module) -> dict[str, Any]:
    """The states of the generators of torch, NumPy and Python, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _devices(model)],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any], model: nn.Module) -> None:
    """Restore the generators to a result of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    for own, device in zip(state["cuda"], _devices(model), strict=False):
        torch.cuda.set_rng_state(own, device)
    np.random.set_state(numpy_state(state["numpy"]))
    random.setstate(python_state(state["python"]))


def restored_by(undo: ExitStack, modules: Iterable[nn.Module], optimizer: Optimizer) -> None:
    """Register on ``undo`` callbacks that restore the weights, the optimizer's state and the generators.

    ``modules`` holds the model first and then its copies.
    """
    kept = tuple(modules)
    undo.callback(set_random_state, random_state(kept[0]), kept[0])
    # Loading replaces an optimizer's state and groups by new objects, so the old ones stay valid.
    undo.callback(optimizer.__setstate__, {"state": optimizer.state, "param_groups": optimizer.param_groups})
    for module in kept:
        undo.callback(module.load_state_dict, _copied(module.state_dict()))


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: pytree.tree_map_only(Tensor, Tensor.clone, value) for name, value in state.items()}


def _check_plain(name: str, value: Any) -> None:
    """Check that ``value`` can be read back. Tensors always can, so the check omits their data."""
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
    # Reading the generator of any other GPU would allocate memory on it.
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
