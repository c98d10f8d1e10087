"""Batches that a trained network is shown: taken apart here, or by a function of the user's."""

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
"""``loss(outputs, targets)``."""

ForwardLoss = Callable[[nn.Module, Any], Tensor]
"""``forward_loss(model, batch)``: runs the model on a batch of any form and gives the loss."""


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on ``device``: in containers, dataclasses, and whatever has a ``to``."""
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
    """What the model gives for a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def run_batch(model: nn.Module, inputs: Any, name: str) -> Any:
    """The same for the inputs of a batch that came as the argument ``name``.

    Raises:
        ValueError: the model does not take them.
    """
    try:
        return run(model, inputs)
    except (TypeError, AttributeError) as error:
        keys = f" with {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else ""
        raise ValueError(
            f"{name}: got a batch whose inputs, a {type(inputs).__name__}{keys}, the model does not take "
            f"({error}), expected (inputs, targets) with a tensor, a tuple of positional or a dict of "
            f"keyword arguments; forward_loss(model, batch) takes batches of any form"
        ) from error


def check_losses(loss: object, forward_loss: object) -> None:
    """At most one of the two is given, and it is a function.

    Raises:
        TypeError: one is no function.
        ValueError: both are given.
    """
    for name, value in (("loss", loss), ("forward_loss", forward_loss)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a function")
    if loss is not None and forward_loss is not None:
        raise ValueError(
            "forward_loss: got a function beside loss, expected one of the two: loss(outputs, targets) for "
            "batches (inputs, targets), or forward_loss(model, batch) for any batch"
        )


class Calibration:
    """The first elements of ``calibration``, as often as wanted, and what they are shown for.

    Args:
        source: the batches; None for none.
        most: at most so many are used.
        loss, forward_loss: at most one of them.

    Raises:
        TypeError, ValueError: an argument does not fit, or does not fit another one.
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
            raise ValueError("calibration: got None with forward_loss, expected the batches that it takes")
        self.loss, self.forward_loss = loss, forward_loss
        self._most, self._given = most, source is not None
        self._source: Iterable[Any] = () if source is None else source
        if isinstance(source, Iterator):
            # It can be gone through only once.
            self._source = list(islice(source, most))

    def __bool__(self) -> bool:
        return self._given

    def losses(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """Per batch, what gives the loss of the model on it, each time that it is called.

        Raises:
            ValueError: there is no batch, or (when called) the model does not take one.
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
        """Per batch, what runs the model on it, without a loss where the batch is taken apart here.

        Raises:
            ValueError: as :meth:`losses`.
        """
        if self.forward_loss is not None:
            yield from self.losses(model)
        else:
            for inputs, _ in self.batches(model):
                yield lambda inputs=inputs: run_batch(model, inputs, "calibration")  # type: ignore[misc]

    def batches(self, model: nn.Module) -> Iterator[Any]:
        """What there is on the model's device: batches for ``forward_loss``, else pairs (inputs, targets).

        Raises:
            ValueError: there is none.
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
    # A DataLoader makes lists of tuples.
    return (tuple(pair[0]), pair[1]) if isinstance(pair[0], list) else pair
