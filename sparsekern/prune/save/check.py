"""Checks before a load: whether a checkpoint fits the model, its optimizer and its copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparsekern.prune.save import generators
from sparsekern.prune.save.schema import OPTIMIZER, optimizer_rule, tensors_rule
from sparsekern.prune.state.future import Future


def classes(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """Class names for a checkpoint; sparsekern's optimizers read the state of torch's of the same name."""
    return {"model": type(model).__qualname__, "optimizer": type(optimizer).__qualname__}


def check_checkpoint(
    content: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    also: Sequence[nn.Module],
    future: Future,
) -> None:
    """Check that all of a checkpoint fits; ``future`` describes ``model`` and ``also`` after the load.

    Raises:
        ValueError: an entry does not fit.
    """
    for kind, name in classes(model, optimizer).items():
        if content["classes"][kind] != name:
            raise ValueError(
                f"checkpoint: got {content['classes'][kind]} as its {kind}, expected {name}; load it into "
                f"objects of the classes that it was saved from"
            )
    check_training(content["model"], content["optimizer"], model, optimizer, future)
    if len(content["also"]) != len(also):
        raise ValueError(
            f"checkpoint: got {len(content['also'])} copies of the model, expected {len(also)}; give the "
            f"Pruner as many as it had when the checkpoint was saved (also=)"
        )
    for index, (module, own) in enumerate(zip(also, content["also"], strict=True)):
        tensors_rule(module, future).check(own, f"checkpoint['also'][{index}]")
    for rank, state in enumerate(content["random"]):
        generators.check_cuda(state, model, f"checkpoint['random'][{rank}]")


def check_training(
    weights: Mapping[str, Any],
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    future: Future,
) -> None:
    """Check that ``model`` and ``optimizer`` can load ``weights`` and ``state`` after a cut to ``future``.

    Raises:
        ValueError: an entry does not fit; the text names it.
    """
    expected = future.entries(model)
    differing = sorted(weights.keys() ^ expected.keys())
    if differing:
        name = differing[0]
        got, wanted = ("none", "one") if name in expected else ("one", "none")
        raise ValueError(
            f"checkpoint['model']: got {got} of the name {name!r}, expected {wanted} ({len(differing)} names "
            f"differ); the checkpoint is of another network"
        )
    try:
        tensors_rule(model, future).check(weights, "checkpoint['model']")
    except ValueError as error:
        raise ValueError(f"{error}; the checkpoint is of another network or was changed") from None
    OPTIMIZER.check(state, "checkpoint['optimizer']")
    optimizer_rule(optimizer, state, future).check(state, "checkpoint['optimizer']")
