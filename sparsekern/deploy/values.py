"""Names of a network's inputs and outputs in a file, and their comparison between torch and a runtime."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekern.compact.verify import leaves
from sparsekern.graph.capture.courses import first_line
from sparsekern.runtimes import Runtime
from sparsekern.runtimes.session import Session


@dataclass(frozen=True)
class Difference:
    """The largest difference of an output.

    Attributes:
        output: name of the output.
        value: the difference over the largest magnitude of the output in torch; infinite where only one of
            the two is finite.
        shapes: the shapes of the inputs, in words.
    """

    output: str
    value: float
    shapes: str

    def __str__(self) -> str:
        return f"output {self.output!r} on {self.shapes} with a difference of {self.value:.1e} of its largest"


def in_order(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments in the order of the forward's parameters, as the exporter has them.

    Raises:
        ValueError: the forward does not take these arguments.
    """
    try:
        bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(
            f"example_inputs: got arguments that {type(network).__name__}.forward does not take ({error}), "
            "expected those of one pass"
        ) from None
    return {name: kwargs[name] for name in bound if name in kwargs} | dict(kwargs)


def input_names(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Sequence[str] | None
) -> list[str]:
    """Names of the tensors among the arguments, in the order of the exporter.

    Raises:
        ValueError: ``given`` has another number of names, or one twice.
    """
    bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    found = []
    for name, value in bound.items():
        items = [(where, leaf) for where, leaf in leaves(value, name) if isinstance(leaf, Tensor)]
        found += [_plain(where) for where, _ in items]
    return _chosen(found, given, "inputs")


def output_names(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Sequence[str] | None
) -> list[str]:
    """Names of the tensors that the network returns, in the order of the exporter.

    Raises:
        ValueError: ``given`` has another number of names, or one twice, or the network returns no tensor.
    """
    with torch.no_grad():
        outputs = list(_outputs(network(*args, **kwargs)))
    if not outputs:
        raise ValueError("network: got one that returns no tensor, expected at least one")
    found = [_plain(where.removeprefix("output")) or "output" for where, _ in outputs]
    # Numbers alone are no good names.
    return _chosen([f"output_{name}" if name.isdecimal() else name for name in found], given, "outputs")


def compare(
    network: nn.Module,
    session: Session,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    names: tuple[Sequence[str], Sequence[str]],
    runtime: Runtime,
) -> Difference:
    """Run network and file on the same arguments; the output that differs most.

    Raises:
        ValueError: the runtime does not run the file on these arguments, or gives other outputs.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    arrays = {
        name: tensor.detach().cpu().numpy()
        for name, tensor in zip(names[0], tensors, strict=True)
        if name in session.inputs
    }
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
    with torch.no_grad():
        expected = list(_outputs(network(*args, **kwargs)))
    try:
        found = session.run(arrays)
    except Exception as error:
        raise ValueError(
            f"network: {runtime} does not run the exported file on {shapes} ({first_line(error)}), "
            "expected the outputs of torch; nothing was written"
        ) from error
    if len(found) != len(expected):
        raise ValueError(
            f"network: {runtime} gives {len(found)} outputs, expected {len(expected)} as in torch"
        )
    every = [
        Difference(name, _difference(tensor.cpu(), array, name, runtime), shapes)
        for name, (_, tensor), array in zip(names[1], expected, found, strict=True)
    ]
    return max(every, key=lambda one: one.value)


def _outputs(output: Any) -> list[tuple[str, Tensor]]:
    return [(where, leaf) for where, leaf in leaves(output) if isinstance(leaf, Tensor)]


def _difference(expected: Tensor, found: NDArray[Any], name: str, runtime: Runtime) -> float:
    if tuple(expected.shape) != found.shape:
        raise ValueError(
            f"network: output {name!r} is {list(found.shape)} in {runtime}, expected "
            f"{list(expected.shape)} as in torch"
        )
    wide = np.complex128 if expected.is_complex() else np.float64
    # NumPy has no bfloat16.
    a = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy().astype(wide)
    b = found.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = np.abs(np.where(np.isfinite(a), a, 0)).max()
        ratio = float(np.where(same, 0, np.abs(a - b)).max() / largest)
    return ratio if ratio == ratio else float("inf")


def _plain(where: str) -> str:
    """``['a'][0].b`` as ``a_0_b``."""
    return "_".join(re.findall(r"\w+", where))


def _chosen(found: list[str], given: Sequence[str] | None, argument: str) -> list[str]:
    """``given``, or ``found`` with a number behind names that occur twice."""
    if given is None:
        return [name if found.index(name) == n else f"{name}_{n}" for n, name in enumerate(found)]
    names = list(given) if not isinstance(given, str) else [given]
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ValueError(f"{argument}: got {names}, expected {len(found)} different names, for {found}")
    return names
