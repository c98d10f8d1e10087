"""Running one op of a network alone, at any width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekern.graph.propagate.operations import Constant, Operand, Operation

# Exceptions that torch raises for a wrong number of channels; the class depends on the op.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


class Call:
    """An operation at given sizes of the network's extents.

    Args:
        operation: the operation.
        sizes: int64 ``[E]``, sizes of the extents.

    Attributes:
        operation: the operation.
        key: text of the op and its arguments, which determine its time on a given machine.
        elements: number of elements of all tensors that the op reads.
    """

    def __init__(self, operation: Operation, sizes: np.ndarray) -> None:
        self.operation = operation
        self._args = _ADJUST.get(operation.target.partition(".")[0], _unchanged)(operation, sizes)
        self._sizes = sizes
        self.elements = sum(int(np.prod(o.sized(sizes), dtype=np.int64)) for o in operation.operands())
        parts = [*map(self._text, self._args), *(f"{k}={self._text(v)}" for k, v in operation.kwargs.items())]
        self.key = f"{operation.target}({', '.join(parts)})"

    def prepare(self, device: torch.device) -> Callable[[], Any]:
        """A function that runs the op once on generated tensors.

        Raises:
            RuntimeError: torch does not have the op. The returned function raises one of FAILURES if the op
                does not take tensors of these sizes.
        """
        function = self.function()
        args, kwargs = self.arguments(lambda operand: self.tensor(operand, device), device)
        return lambda: function(*args, **kwargs)

    def function(self) -> Callable[..., Any]:
        """The op in ``torch.ops``.

        Raises:
            RuntimeError: torch does not have the op.
        """
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
        """Positional and keyword arguments of the op.

        Args:
            tensor: returns the tensor of an operand; called in the order of the operands.
            device: replaces each device argument.
        """

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
        """A tensor with the operand's shape, dtype and memory order.

        It holds ones, which in-place arithmetic leaves harmless. Integer tensors hold 0, a valid index.
        """
        order, shape = operand.order, operand.sized(self._sizes)
        dtype = getattr(torch, operand.dtype)
        laid = torch.empty([shape[d] for d in order], dtype=dtype, device=device)
        tensor = laid.permute(sorted(range(len(order)), key=order.__getitem__))
        number = dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
        return tensor.fill_(1 if number else 0)

    def fits(self, operand: Operand, value: object) -> bool:
        """Whether ``value`` is a tensor with the operand's shape and dtype."""
        return (
            isinstance(value, Tensor)
            and value.shape == operand.sized(self._sizes)
            and value.dtype == getattr(torch, operand.dtype)
        )

    def _text(self, argument: Any) -> str:
        """An argument as text for the key."""
        if isinstance(argument, Operand):
            shape = "x".join(map(str, argument.sized(self._sizes)))
            return f"{argument.dtype}[{shape}]@{''.join(map(str, argument.order))}"
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(map(self._text, argument))}]"
        return argument.name if isinstance(argument, Constant) else str(argument)


def _unchanged(operation: Operation, sizes: np.ndarray) -> list[Any]:
    """The arguments of an op without numbers of channels."""
    return list(operation.args)


def _convolution(operation: Operation, sizes: np.ndarray) -> list[Any]:
    """Adjust the number of groups to the channels where each filter reads a fixed number (depthwise)."""
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
    """Scale the number of groups with the number of channels; at least 1."""
    args = list(operation.args)
    args[1] = max(1, args[1] * args[0].sized(sizes)[1] // args[0].shape[1])
    return args


def _layer_norm(operation: Operation, sizes: np.ndarray) -> list[Any]:
    """Set the normalised shape to the sizes of the input."""
    args = list(operation.args)
    args[1] = list(args[0].sized(sizes)[-len(args[1]) :])
    return args


# Functions that adjust the arguments of ops which contain numbers of channels, by op name without overload.
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
