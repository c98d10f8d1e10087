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
        names: all its names; several if it is tied. The first registered one comes first.
        shape: sizes.
        parameter: whether it is a parameter.
        itemsize: bytes per element.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    parameter: bool
    itemsize: int


@dataclass(frozen=True)
class Captured:
    """One traced graph.

    Attributes:
        module: the graph.
        sources: by placeholder name, the number of the registered tensor that it represents, or the
            reason why it represents none.
        constants: tensors that the program made, by placeholder name.
        training: whether the graph is that of training mode.
        kept: where modules keep the last outputs of the graph, which the model does not return.
        course: the answers to conditions on values that lead to the graph, by the line that asks.
        record: the record of a run with the same ops; None if the graph alone tells them.
        both: whether the graph is that of both modes.
        first: whether the graph is the first of its mode.
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
