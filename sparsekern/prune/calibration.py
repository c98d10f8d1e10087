"""Calibration batches for a trained network, split into inputs and targets here or by a user's function."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Loss = Callable[[Any, Any], Tensor]
"""``loss(outputs, targets)`` returns a scalar."""

ForwardLoss = Callable[[nn.Module, Any], Tensor]
"""``forward_loss(model, batch)`` runs the model on a batch of any form and returns the loss."""


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on ``device``: in containers, dataclasses and objects with a method ``to``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        own = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(own, field.name, moved(getattr(batch, field.name), device))
        return own
    if not pytree.tree_is_leaf(batch):
        return pytree.tree_map(lambda leaf: moved(leaf, device), batch)
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        return batch.to(device)
    return batch


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs for a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def run_batch(model: nn.Module, inputs: Any, name: str) -> Any:
    """The model's outputs for the inputs of a batch.

    Args:
        model: the model.
        inputs: as for :func:`run`.
        name: the user's argument that the batch comes from, for the error.

    Raises:
        ValueError: the model does not accept the inputs.
    """
    try:
        return run(model, inputs)
    except (TypeError, AttributeError) as error:
        keys = f" with {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else ""
        raise ValueError(
            f"{name}: got a batch with inputs of type {type(inputs).__name__}{keys}, which the model does "
            f"not accept ({error}), expected (inputs, targets) with a tensor, a tuple of positional or a "
            f"dict of keyword arguments; pass forward_loss(model, batch) for batches of any other form"
        ) from error


def check_losses(loss: object, forward_loss: object) -> None:
    """Check that at most one of the two is given, and that it is a function.

    Raises:
        TypeError: one is not a function.
        ValueError: both are given.
    """
    for name, value in (("loss", loss), ("forward_loss", forward_loss)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a function")
    if loss is not None and forward_loss is not None:
        raise ValueError(
            "forward_loss: got a function as well as loss, expected only one of them; loss(outputs, targets) "
            "serves batches (inputs, targets), forward_loss(model, batch) serves any batch"
        )


class Calibration:
    """The first batches of ``calibration``, which can be repeated, and the loss for them.

    Args:
        source: the batches; None for no calibration.
        most: maximal number of batches used.
        loss, forward_loss: functions of a loss; at most one of them is given.

    Raises:
        TypeError, ValueError: an argument is invalid or contradicts another one.
    """

    def __init__(
        self,
        source: Iterable[Any] | None,
        most: int,
        loss: Loss | None = None,
        forward_loss: ForwardLoss | None = None,
    ) -> None:
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"batches: got {most!r}, expected a whole number >= 1")
        check_losses(loss, forward_loss)
        if source is None and forward_loss is not None:
            raise ValueError("calibration: got None with forward_loss, expected batches for forward_loss")
        self.loss, self.forward_loss = loss, forward_loss
        self._most, self._given = most, source is not None
        self._source: Iterable[Any] = () if source is None else source
        if isinstance(source, Iterator):
            # An iterator can be read only once.
            self._source = list(islice(source, most))

    def __bool__(self) -> bool:
        return self._given

    def losses(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """For each batch a function that computes the model's loss on it at every call.

        Raises:
            ValueError: there is no batch, or (when called) the model does not accept it.
        """
        for batch in self.batches(model):
            yield lambda batch=batch: self._loss_of(model, batch)  # type: ignore[misc]

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        if self.forward_loss is not None:
            return self.forward_loss(model, batch)
        assert self.loss is not None
        inputs, targets = batch
        return self.loss(run_batch(model, inputs, "calibration"), targets)

    def passes(self, model: nn.Module) -> Iterator[Callable[[], Any]]:
        """For each batch a function that runs the model on it; it computes a loss only with ``forward_loss``.

        Raises:
            ValueError: as :meth:`losses`.
        """
        if self.forward_loss is not None:
            yield from self.losses(model)
        else:
            for inputs, _ in self.batches(model):
                yield lambda inputs=inputs: run_batch(model, inputs, "calibration")  # type: ignore[misc]

    def batches(self, model: nn.Module) -> Iterator[Any]:
        """The batches on the model's device: whole with ``forward_loss``, else as pairs (inputs, targets).

        Raises:
            ValueError: there is no batch.
        """
        device = next(model.parameters()).device
        empty = True
        for batch in islice(self._source, self._most):
            empty = False
            yield moved(batch if self.forward_loss is not None else _pair(batch), device)
        if empty:
            raise ValueError("calibration: got no batch, expected at least one")


def _pair(batch: Any) -> tuple[Any, Any]:
    pair = tuple(batch) if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    # A DataLoader collates tuples into lists.
    return (tuple(pair[0]), pair[1]) if isinstance(pair[0], list) else pair
