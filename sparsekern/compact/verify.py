"""Checking that a compact model gives the same outputs as the masked model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A position inside an output, such as ``['out'][0]``, and the value at that position.
Leaf = tuple[str, Any]


def verify(
    model: nn.Module,
    small: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> float:
    """The largest relative difference between the outputs of two models.

    Both models run in evaluation mode without gradients; modes and random state are restored. The difference
    of each output tensor is divided by the tensor's largest magnitude, and the largest ratio counts.

    Args:
        model: the masked model. Its outputs may be tensors, numbers, and nested dicts, lists, tuples and
            dataclasses of them.
        small: the compact model.
        example_inputs: a tensor, or a tuple or list of positional arguments.
        example_kwargs: keyword arguments.

    Returns:
        0 for equal outputs, about the dtype's epsilon for rounding, ``inf`` where only one output is finite.

    Raises:
        ValueError: the outputs differ in structure or shape, are empty, or hold values of other types.
    """
    args, kwargs = as_arguments(example_inputs, example_kwargs)
    with torch.no_grad(), torch.random.fork_rng(_cuda_devices(model, small)):
        state = torch.get_rng_state()
        expected = _run(model, args, kwargs)
        torch.set_rng_state(state)
        found = _run(small, args, kwargs)
    differences = [_difference(a, b, where) for where, a, b in _pair(expected, found)]
    if not differences:
        raise ValueError("model: got an empty output, expected at least one tensor")
    return max(differences)


def as_arguments(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model from the example inputs of a user."""
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), dict(example_kwargs or {})
    return (example_inputs,), dict(example_kwargs or {})


def leaves(output: Any, where: str = "output") -> Iterator[Leaf]:
    """The leaves of a nested output with their positions, in a fixed order."""
    if isinstance(output, Mapping):
        for key in output:
            yield from leaves(output[key], f"{where}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for number, item in enumerate(output):
            yield from leaves(item, f"{where}[{number}]")
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for item in dataclasses.fields(output):
            yield from leaves(getattr(output, item.name), f"{where}.{item.name}")
    else:
        yield where, output


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of every module of ``model`` in the block and restore each module's own mode after it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Leaf]:
    with mode(model, training=False):
        return list(leaves(model(*args, **kwargs)))


def _pair(expected: list[Leaf], found: list[Leaf]) -> Iterator[tuple[str, Any, Any]]:
    theirs, ours = [where for where, _ in expected], [where for where, _ in found]
    if theirs != ours:
        missing = sorted(set(theirs) ^ set(ours))
        raise ValueError(
            f"small: got an output of {len(ours)} values, expected {len(theirs)} like that of model; only "
            f"one of the two has {', '.join(missing[:5])}"
        )
    for (where, a), (_, b) in zip(expected, found, strict=True):
        yield where, a, b


def _difference(a: Any, b: Any, where: str) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        if type(a) is not type(b):
            raise ValueError(
                f"small: got {type(b).__name__} as {where}, expected {type(a).__name__} like that of model"
            )
        if a is None or isinstance(a, (str, bytes)):
            return 0.0 if a == b else float("inf")
        if not isinstance(a, (int, float, complex)):
            raise ValueError(
                f"model: got {type(a).__name__} as {where}, expected tensors, numbers, and dicts, lists, "
                f"tuples and dataclasses of them"
            )
        a, b = torch.tensor(a), torch.tensor(b)
    if a.shape != b.shape:
        raise ValueError(
            f"small: got shape {list(b.shape)} of {where}, expected {list(a.shape)} like that of model"
        )
    a, b = _exact(a), _exact(b)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, 0, (a - b).abs()).max()
    scale = a.abs().nan_to_num(posinf=0.0).max()
    ratio = float(difference / scale)
    return ratio if ratio == ratio else float("inf")


def _exact(tensor: Tensor) -> Tensor:
    """The tensor on the CPU in float64 or complex128, as differences in bfloat16 would round."""
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return tensor.cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _cuda_devices(*models: nn.Module) -> list[torch.device]:
    found = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    return sorted(found, key=str)
