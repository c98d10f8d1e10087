"""Looking at a network before it is pruned: found by name, traced, and a plan for it by its weights."""

from __future__ import annotations

import importlib
import operator
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.graph import ChannelGraph
from sparsekern.prune.decide.allocate import WITHOUT_DATA
from sparsekern.prune.decide.budget import check_keep, check_unit
from sparsekern.prune.decide.criteria import Magnitude
from sparsekern.prune.once import task_of
from sparsekern.prune.state.statistics import of_weights
from sparsekern.recipes._torchvision import blame, mismatch, used_by, warn_of_mismatch


def find_model(target: str) -> nn.Module:
    """The network that ``module:factory`` names, also in the working directory.

    ``factory`` is what makes the network when called without arguments, or the network itself.

    Raises:
        ValueError: there is no such module or factory, or it does not give an ``nn.Module``.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise ValueError(
            f"target: got {target!r}, expected module:factory, such as torchvision.models:resnet18"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = blame(error) or f"{type(error).__name__}: {error}"
        raise ValueError(f"target: cannot import {module_name!r}: {reason}") from error
    if mismatch() is not None and used_by(module_name.partition(".")[0]):
        warn_of_mismatch()
    try:
        factory = operator.attrgetter(path)(module)
    except AttributeError as error:
        raise ValueError(
            f"target: {module_name!r} has no {path!r}, expected a factory of a network"
        ) from error
    if isinstance(factory, nn.Module):
        return factory
    try:
        model = factory()
    except Exception as error:
        reason = blame(error) or f"{type(error).__name__}: {error}"
        raise ValueError(f"target: {target} called without arguments raised {reason}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"target: {target} gave {type(model).__name__}, expected a torch.nn.Module")
    return model


def make_input(spec: str) -> Tensor:
    """A tensor for ``1,3,224,224`` (normal noise, float32) or ``1,128:int64`` (zeros).

    Raises:
        ValueError: it is no such list of sizes.
    """
    found = re.fullmatch(r"(\d+(?:,\d+)*)(?::(\w+))?", spec.replace(" ", ""))
    dtype = getattr(torch, found[2] or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise ValueError(f"--input: got {spec!r}, expected sizes such as 1,3,224,224 or 1,128:int64")
    shape = [int(size) for size in found[1].split(",")]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def plan_by_weights(
    model: nn.Module, inputs: tuple[Tensor, ...], *, keep: float, of: str = "macs", round_to: int | str = 1
) -> tuple[ChannelGraph, np.ndarray]:
    """The graph, and the channels (bool ``[C]``) that the magnitudes of the weights would keep.

    The arguments are those of :func:`sparsekern.prune_once`, which also makes the smaller network.

    Raises:
        ValueError: as there.
    """
    task = task_of(model, inputs, keep=check_keep(keep), of=check_unit(of), round_to=round_to)
    saliency = Magnitude()(of_weights(model, task.graph))
    return task.graph, WITHOUT_DATA(replace(task, saliency=saliency))
