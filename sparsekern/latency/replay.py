"""Running all ops of a network in their order, each on the results of earlier ops, without the network.

An op that is timed alone has its operands and its result's memory in the cache. Among other ops it does not.
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
    """The operations of a network at given sizes, with generated parameters and inputs.

    If an earlier operation did not produce an operand with the expected shape and dtype, the operand is
    generated. This happens when an operation names sizes in its arguments and fails at other sizes. Results
    are freed after their last use, as in a forward pass.

    Args:
        operations: the operations in the order of a forward pass.
        sizes: int64 ``[E]``, sizes of the extents.
        device: device of all tensors.
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
        """Seconds of every operation in one pass; NaN for operations that fail."""
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
        """A function that returns the tensors of call ``number``; called in the order of its operands."""
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
