"""What the callbacks of all trainers share."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsekern.files.atomic import load_plain
from sparsekern.files.schema import TEXT, Anything, Entries
from sparsekern.prune import Pruner


class Pruning:
    """What a callback offers beside the hooks of its trainer.

    Attributes:
        pruner: made when the training starts, None before.
    """

    pruner: Pruner | None = None

    def compact(self) -> nn.Module:
        """See :meth:`sparsekern.Pruner.compact`.

        Raises:
            RuntimeError: the training has not started.
        """
        if self.pruner is None:
            raise RuntimeError("pruner: there is none yet, expected the training to have started")
        return self.pruner.compact()


class HeldWeights:
    """Weights that a trainer loads before a Pruner can cut the model to their sizes.

    Trainers restore the model first, make its optimizer then, and tell their callbacks last. So the first
    ``load_state_dict`` of the model only reaches this object, and the model loads its own weights instead.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights: dict[str, Tensor] | None = None
        self._hook = model.register_load_state_dict_pre_hook(self._hold)

    def _hold(self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        # With a prefix the model is loaded as a part of another one, which no trainer does.
        if not prefix:
            self._weights = dict(state_dict)
            state_dict.clear()
            state_dict.update(module.state_dict())

    def take(self) -> dict[str, Tensor] | None:
        """The weights, None if none came; the model loads for itself from now on."""
        self._hook.remove()
        weights, self._weights = self._weights, None
        return weights


def check_both(weights: object | None, state: object | None, argument: str) -> None:
    """Refuse a checkpoint of a run without pruning: the schedule would begin where that run had got to.

    Raises:
        ValueError: there are weights without a Pruner's state; names ``argument``.
    """
    if weights is not None and state is None:
        raise ValueError(f"{argument}: got a checkpoint of a run without the callback, expected one with it")


def optimizer_of(module: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The one that holds the most of the module's parameters.

    Raises:
        ValueError: there is none.
    """
    if not optimizers:
        raise ValueError("optimizer: the trainer has none, expected one that trains the model")
    own = {id(param) for param in module.parameters()}
    return max(
        optimizers, key=lambda o: sum(id(p) in own for group in o.param_groups for p in group["params"])
    )


def progress(pruner: Pruner) -> dict[str, float]:
    """The numbers that are worth a curve, from :meth:`sparsekern.Pruner.metrics`."""
    metrics = pruner.metrics()
    named = {f"pruning/{name}": float(metrics[name]) for name in ("macs_share", "params_share", "condemned")}
    return named | {"pruning/channels": float(metrics["kept"])}


def to_text(state: dict[str, Any]) -> str:
    """Tensors and plain values as base64, for trainers that keep the state of callbacks as JSON."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> dict[str, Any]:
    """What :func:`to_text` was given, on the CPU.

    Raises:
        ValueError: the text is damaged or something else.
    """
    try:
        found = load_plain(io.BytesIO(base64.b64decode(text, validate=True)))
        Entries(TEXT, Anything()).check(found, "its content")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"state: got a text that is damaged ({error}), expected that of a callback"
        ) from None
    own: dict[str, Any] = found
    return own
