"""Writing and reading a checkpoint: model, optimizer, Pruner, generators and extra values in one file."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sparsekern.compact.transaction import all_or_nothing
from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import check_plain
from sparsekern.files.atomic import read_plain, replacing, save_plain, target
from sparsekern.prune.save import generators
from sparsekern.prune.save.check import check_checkpoint, check_training, classes
from sparsekern.prune.save.saved_state import SavedState
from sparsekern.prune.save.schema import CHECKPOINT, FORMAT, METADATA, VERSION
from sparsekern.prune.state.network import Network

_PLAIN = (bool, int, float, str, type(None))


class Checkpoint:
    """Saves a training to a file and goes on from it.

    Args:
        saved: the Pruner's state.
        network: the model, its optimizer and its copies.
        ranks: the processes of the training.

    Attributes:
        saved: the part of the content that belongs to the Pruner.
    """

    def __init__(self, saved: SavedState, network: Network, ranks: Ranks) -> None:
        self.saved, self._network, self._ranks = saved, network, ranks

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Any]) -> None:
        """See :meth:`sparsekern.Pruner.save_checkpoint`."""
        network = self._network
        _check_whole(network.model)
        with self._ranks.agreeing("saving a checkpoint") as check:
            network.check_masked()
            check()
        # Each process has its own generators and counts of activations.
        own = generators.random_state(network.model), network.activations.state_dict()
        random, counted = map(list, zip(*self._ranks.gather(own), strict=True))
        with self._ranks.agreeing(f"writing {os.fspath(path)!r}") as check:
            if self._ranks.rank == 0:
                content = {
                    "classes": classes(network.model, network.optimizer),
                    "model": network.model.state_dict(),
                    "optimizer": network.optimizer.state_dict(),
                    "pruner": self.saved.state_dict(),
                    "also": [module.state_dict() for module in network.also],
                    "random": random,
                    "activations": counted,
                    "extra": extra,
                }
                write(path, content)
            check()

    def load(self, path: str | os.PathLike[str], also: Sequence[nn.Module]) -> dict[str, Any]:
        """See :meth:`sparsekern.Pruner.load_checkpoint`."""
        network, ranks = self._network, self._ranks
        _check_whole(network.model)
        with ranks.agreeing(f"reading {os.fspath(path)!r}") as check:
            content = read(path)
            state = content["pruner"]
            if "activations" in state:
                counted = content["activations"]
                state |= {"activations": counted[ranks.rank % len(counted)]}
            future = network.future(self.saved.check(state))
            check_checkpoint(content, network.model, network.optimizer, network.also, future)
            check(state["step"], state["channels"].numpy())
        random = content["random"][ranks.rank % len(content["random"])]
        with all_or_nothing() as undo, ranks.changing(f"loading {os.fspath(path)!r}") as (ready, done):
            self.saved.load_within(undo, state, also, ready)
            restored_by(undo, (network.model, *network.also), network.optimizer)
            network.model.load_state_dict(content["model"])
            network.optimizer.load_state_dict(in_own_memory(content["optimizer"]))
            for module, own in zip(network.also, content["also"], strict=True):
                module.load_state_dict(own)
            generators.set_random_state(random, network.model)
            done()
        extra: dict[str, Any] = content["extra"]
        return extra

    def check(
        self, state: Mapping[str, Any], weights: Mapping[str, Any], optimizer: Mapping[str, Any]
    ) -> None:
        """Check that the Pruner, its model and its optimizer can load these state dicts.

        Raises:
            ValueError: one of them does not fit.
        """
        network = self._network
        future = network.future(self.saved.check(state))
        check_training(weights, optimizer, network.model, network.optimizer, future)


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
    where = f"path: got {os.fspath(path)!r}, which"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{where} was not written by Pruner.save_checkpoint, expected a file that was")
    if content.get("version") != VERSION:
        raise ValueError(f"{where} has format version {content.get('version')!r}, expected {VERSION}")
    try:
        CHECKPOINT.check(content, "checkpoint")
        for state in (content["model"], *content["also"]):
            METADATA.check(getattr(state, "_metadata", {}), "checkpoint['model']._metadata")
    except ValueError as error:
        raise ValueError(f"{where} is damaged or was changed: {error}") from None
    return content


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


def restored_by(undo: ExitStack, modules: Iterable[nn.Module], optimizer: Optimizer) -> None:
    """Register on ``undo`` callbacks that restore the weights, the optimizer's state and the generators.

    ``modules`` holds the model first and then its copies.
    """
    kept = tuple(modules)
    undo.callback(generators.set_random_state, generators.random_state(kept[0]), kept[0])
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


def _check_whole(model: nn.Module) -> None:
    check_plain(
        "model",
        model.named_parameters(),
        "save state_dict() of model, optimizer and Pruner with torch.distributed.checkpoint where they are "
        "sharded",
    )
