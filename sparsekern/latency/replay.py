"""Running all ops of a network in their order, each on what the others made, without the network.

By itself an op finds its operands in the cache and its result's memory warm; between the others it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.graph.propagate.operations import Operand, Operation
from sparsekern.latency.calls import FAILURES, Call
from sparsekern.latency.timing import Stopwatch


class Replay:
    """The operations at given sizes of the extents (int64 ``[E]``), with parameters and inputs of their own.

    An operand that no operation made as it should be (one whose arguments name sizes fails at others) is
    made up. Results are let go after their last use, as in a forward pass.
    """

    def __init__(self, operations: Sequence[Operation], sizes: np.ndarray, device: torch.device) -> None:
        self._device = device
        self._calls = [Call(operation, sizes) for operation in operations]
        self._given = {
            (number, index): call.tensor(operand, device)
            for number, call in enumerate(self._calls)
            for index, operand in enumerate(call.operation.operands())
            if operand.source is None
        }
        last: dict[str, int] = {}
        for number, call in enumerate(self._calls):
            last[call.operation.name] = number
            for operand in call.operation.operands():
                if operand.source is not None:
                    last[operand.source[0]] = number
        self._done: list[list[str]] = [[] for _ in self._calls]
        for name, number in last.items():
            self._done[number].append(name)

    def seconds(self, watch: Stopwatch) -> list[float]:
        """Seconds of every operation in one pass; NaN for those that fail."""
        made: dict[str, Any] = {}
        times = []
        for number, call in enumerate(self._calls):
            results: list[Any] = []
            try:
                function = call.function()
                args, kwargs = call.arguments(self._operands(number, made), self._device)
                times.append(watch.seconds(lambda: results.append(function(*args, **kwargs))))  # noqa: B023
                made[call.operation.name] = results.pop()
            except FAILURES:
                times.append(float("nan"))
            args, kwargs = [], {}
            for name in self._done[number]:
                made.pop(name, None)
        return times

    def _operands(self, number: int, made: dict[str, Any]) -> Any:
        """What gives the tensors of one call, asked in the order of its operands."""
        call, index = self._calls[number], iter(range(1_000_000))

        def tensor(operand: Operand) -> Tensor:
            position = next(index)
            if operand.source is None:
                return self._given[number, position]
            name, output = operand.source
            value = made.get(name)
            if isinstance(value, (list, tuple)):
                value = value[output] if output < len(value) else None
            return value if call.fits(operand, value) else call.tensor(operand, self._device)  # type: ignore[return-value]

        return tensor
