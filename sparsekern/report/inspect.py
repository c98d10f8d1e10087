"""Inspecting a network before it is pruned: import it by name and make a plan from its weights."""

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
from sparsekern.prune.state.statistics import weight_statistics
from sparsekern.recipes._torchvision import blame, mismatch, used_by, warn_of_mismatch
from sparsekern.runtimes import check_runtime


def find_model(target: str) -> nn.Module:
    """Import the network that ``target`` names.

    Args:
        target: ``module:factory``. The module may be in the working directory. The factory is a callable
            without arguments that returns the network, or the network itself.

    Raises:
        ValueError: the module or the factory does not exist, or gives no ``nn.Module``.
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
        raise ValueError(
            f"target: got {target!r}, whose module {module_name!r} cannot be imported, expected "
            f"module:factory: {_cause(error)}"
        ) from error
    if mismatch() is not None and used_by(module_name.partition(".")[0]):
        warn_of_mismatch()
    try:
        factory = operator.attrgetter(path)(module)
    except AttributeError as error:
        raise ValueError(
            f"target: got {target!r}, but {module_name!r} has no {path!r}, expected a factory of a network"
        ) from error
    if isinstance(factory, nn.Module):
        return factory
    try:
        model = factory()
    except Exception as error:
        raise ValueError(
            f"target: got {target!r}, which fails without arguments, expected a factory that needs none: "
            f"{_cause(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"target: got {target!r}, which returns a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def _cause(error: BaseException) -> str:
    """The cause of a failed import or call, as text."""
    return blame(error) or f"{type(error).__name__}: {error}"


def make_input(spec: str) -> Tensor:
    """A tensor from a text: ``1,3,224,224`` gives normal noise in float32, ``1,128:int64`` gives zeros.

    Raises:
        ValueError: ``spec`` is not such a list of sizes.
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
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    keep: float,
    of: str = "macs",
    runtime: str = "torch",
    round_to: int | str = 1,
) -> tuple[ChannelGraph, np.ndarray]:
    """The channel graph, and the channels (bool ``[C]``) that a plan by weight magnitude keeps.

    The arguments are those of :func:`sparsekern.prune_once`, which also makes the smaller network.

    Raises:
        ValueError: an argument is out of range, or the network cannot be traced or pruned so far.
    """
    task = task_of(
        model,
        inputs,
        keep=check_keep(keep),
        of=check_unit(of, runtime),
        runtime=check_runtime(runtime),
        round_to=round_to,
    )
    saliency = Magnitude()(weight_statistics(model, task.graph))
    return task.graph, WITHOUT_DATA(replace(task, saliency=saliency))
