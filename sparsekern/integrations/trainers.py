"""The shared parts of the callbacks of all trainers."""

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
    """The interface of a callback beside the hooks of its trainer.

    Attributes:
        pruner: the Pruner of the training; None before the training starts.
    """

    pruner: Pruner | None = None

    def compact(self) -> nn.Module:
        """See :meth:`sparsekern.Pruner.compact`.

        Raises:
            RuntimeError: the training has not started.
        """
        if self.pruner is None:
            raise RuntimeError(
                "pruner: got none yet, expected a training that has started; use it after that"
            )
        return self.pruner.compact()


class HeldWeights:
    """Weights that a trainer loads before a Pruner can cut the model to their sizes.

    A trainer restores the model first, then makes its optimizer, and calls its callbacks last. This object
    therefore takes the weights of the first ``load_state_dict``, and the model loads its own weights instead.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights: dict[str, Tensor] | None = None
        self._hook = model.register_load_state_dict_pre_hook(self._hold)

    def _hold(self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        # A prefix means that a parent module loads, which no trainer does.
        if not prefix:
            self._weights = dict(state_dict)
            state_dict.clear()
            state_dict.update(module.state_dict())

    def take(self) -> dict[str, Tensor] | None:
        """The held weights, or None without a load; later loads reach the model itself."""
        self._hook.remove()
        weights, self._weights = self._weights, None
        return weights


def check_both(weights: object | None, state: object | None, argument: str) -> None:
    """Refuse a checkpoint of a run without pruning, as the pruning schedule would begin in its middle.

    Raises:
        ValueError: there are weights without a Pruner's state; the error names ``argument``.
    """
    if weights is not None and state is None:
        raise ValueError(
            f"{argument}: got a checkpoint of a run without PruningCallback, expected one with it"
        )


def optimizer_of(module: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer that holds the most parameters of the module.

    Raises:
        ValueError: ``optimizers`` is empty.
    """
    if not optimizers:
        raise ValueError("optimizer: got a trainer without one, expected one that trains the model")
    own = {id(param) for param in module.parameters()}
    return max(
        optimizers, key=lambda o: sum(id(p) in own for group in o.param_groups for p in group["params"])
    )


def progress(pruner: Pruner) -> dict[str, float]:
    """The values to log as curves, from :meth:`sparsekern.Pruner.metrics`."""
    metrics = pruner.metrics()
    named = {f"pruning/{name}": float(metrics[name]) for name in ("macs_share", "params_share", "condemned")}
    return named | {"pruning/channels": float(metrics["kept"])}


def to_text(state: dict[str, Any]) -> str:
    """Tensors and plain values as base64 text, for trainers that store the state of callbacks as JSON."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> dict[str, Any]:
    """The inverse of :func:`to_text`; tensors are on the CPU.

    Raises:
        ValueError: the text is damaged or something else.
    """
    try:
        found = load_plain(io.BytesIO(base64.b64decode(text, validate=True)))
        Entries(TEXT, Anything()).check(found, "its content")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"state: got a damaged text ({error}), expected the state that a callback saved"
        ) from None
    own: dict[str, Any] = found
    return own
