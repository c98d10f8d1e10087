"""Running one op of a network by itself, at any width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.graph.propagate.operations import Constant, Operand, Operation

# What a wrong number of channels raises, whoever looks first.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


class Call:
    """An operation at given sizes of the network's extents (int64 ``[E]``).

    Attributes:
        operation: what is called.
        key: what determines its time on a given machine, as text.
        elements: numbers in all tensors that it reads.
    """

    def __init__(self, operation: Operation, sizes: np.ndarray) -> None:
        self.operation = operation
        self._args = _ADJUST.get(operation.target.partition(".")[0], _unchanged)(operation, sizes)
        self._sizes = sizes
        self.elements = sum(int(np.prod(o.sized(sizes), dtype=np.int64)) for o in operation.operands())
        parts = [*map(self._text, self._args), *(f"{k}={self._text(v)}" for k, v in operation.kwargs.items())]
        self.key = f"{operation.target}({', '.join(parts)})"

    def prepare(self, device: torch.device) -> Callable[[], Any]:
        """What runs the op once, on tensors made for it.

        Raises:
            one of FAILURES: the op does not exist, or does not take tensors of these sizes.
        """
        function = self.function()
        args, kwargs = self.arguments(lambda operand: self.tensor(operand, device), device)
        return lambda: function(*args, **kwargs)

    def function(self) -> Callable[..., Any]:
        """The op itself. Raises RuntimeError if torch does not have it."""
        namespace, _, name = self.operation.target.partition("::")
        packet, _, overload = name.partition(".")
        try:
            found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        except AttributeError as error:
            raise RuntimeError(str(error)) from error
        return found

    def arguments(
        self, tensor: Callable[[Operand], Tensor], device: torch.device
    ) -> tuple[list[Any], dict[str, Any]]:
        """What the op is called with, given what every operand is."""

        def filled(argument: Any) -> Any:
            if isinstance(argument, Operand):
                return tensor(argument)
            if isinstance(argument, (list, tuple)):
                return [filled(item) for item in argument]
            if isinstance(argument, Constant):
                name = argument.name
                return device if name == "device" else getattr(torch, name.removeprefix("torch."))
            return argument

        args = [filled(argument) for argument in self._args]
        return args, {name: filled(value) for name, value in self.operation.kwargs.items()}

    def tensor(self, operand: Operand, device: torch.device) -> Tensor:
        """Ones in the operand's shape, which in-place arithmetic leaves harmless; index 0 of integers."""
        order, shape = operand.order, operand.sized(self._sizes)
        dtype = getattr(torch, operand.dtype)
        laid = torch.empty([shape[d] for d in order], dtype=dtype, device=device)
        tensor = laid.permute(sorted(range(len(order)), key=order.__getitem__))
        number = dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
        return tensor.fill_(1 if number else 0)

    def fits(self, operand: Operand, value: object) -> bool:
        """Whether ``value`` is a tensor as the operand should be."""
        return (
            isinstance(value, Tensor)
            and value.shape == operand.sized(self._sizes)
            and value.dtype == getattr(torch, operand.dtype)
        )

    def _text(self, argument: Any) -> str:
        if isinstance(argument, Operand):
            shape = "x".join(map(str, argument.sized(self._sizes)))
            return f"{argument.dtype}[{shape}]@{''.join(map(str, argument.order))}"
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(map(self._text, argument))}]"
        return argument.name if isinstance(argument, Constant) else str(argument)


def _unchanged(operation: Operation, sizes: np.ndarray) -> list[Any]:
    return list(operation.args)


def _convolution(operation: Operation, sizes: np.ndarray) -> list[Any]:
    """Groups go with the channels where a filter sees a fixed number of them (depthwise)."""
    args = list(operation.args)
    weight = args[1]
    if len(args) > 6 and isinstance(args[6], int) and args[6] > 1 and isinstance(weight, Operand):
        transposed = "transpose" in operation.target
        before, now = weight.shape, weight.sized(sizes)
        if transposed:
            args[6] = args[6] * now[0] // before[0] if before[0] == args[6] else args[6]
        else:
            x = args[0]
            args[6] = x.sized(sizes)[len(x.shape) - len(before) + 1] // now[1]
    return args


def _group_norm(operation: Operation, sizes: np.ndarray) -> list[Any]:
    args = list(operation.args)
    args[1] = max(1, args[1] * args[0].sized(sizes)[1] // args[0].shape[1])
    return args


def _layer_norm(operation: Operation, sizes: np.ndarray) -> list[Any]:
    args = list(operation.args)
    args[1] = list(args[0].sized(sizes)[-len(args[1]) :])
    return args


# Ops with a number of channels among their arguments, by name without overload.
_ADJUST: dict[str, Callable[[Operation, np.ndarray], list[Any]]] = {
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
    "aten::conv3d": _convolution,
    "aten::conv_transpose1d": _convolution,
    "aten::conv_transpose2d": _convolution,
    "aten::conv_transpose3d": _convolution,
    "aten::group_norm": _group_norm,
    "aten::layer_norm": _layer_norm,
}
