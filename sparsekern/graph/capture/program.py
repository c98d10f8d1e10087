"""The traced programs of a model, and the parameters and buffers that they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

INPUT = "tied to an input of the network"


CONSTANT = "tied to a constant tensor"


@dataclass(frozen=True)
class Registered:
    """A parameter or buffer of the model.

    Attributes:
        names: All its names; several if it is tied. The first registered one comes first.
        shape: Sizes.
        parameter: Whether it is a parameter.
        itemsize: Bytes per element.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    parameter: bool
    itemsize: int


@dataclass(frozen=True)
class Captured:
    """One traced graph.

    Attributes:
        module: The graph.
        sources: By placeholder name, the number of the registered tensor that it represents, or the
            reason why it represents none.
        constants: Tensors that the program made, by placeholder name.
        training: Whether the graph is that of training mode.
        kept: Where modules keep the last outputs of the graph, which the model does not return.
        course: The answers to conditions on values that lead to the graph, by the line that asks.
        record: The record of a run with the same ops; None if the graph alone tells them.
        both: Whether the graph is that of both modes.
        first: Whether the graph is the first of its mode.
    """

    module: torch.fx.GraphModule
    sources: Mapping[str, int | str]
    constants: Mapping[str, Any]
    training: bool
    kept: tuple[str, ...] = ()
    course: Mapping[Any, tuple[bool, ...]] = field(default_factory=dict)
    record: Any = None
    both: bool = False
    first: bool = True
