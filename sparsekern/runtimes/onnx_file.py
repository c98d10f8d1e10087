"""Writing networks as ONNX files with torch's exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Size limit of a single ONNX file: 2 GiB.
LARGEST = (1 << 31) - 1


def onnx_model(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> Any:
    """The network as an ``onnx.ModelProto``, in evaluation mode without gradients.

    Args:
        network: the network, already in evaluation mode.
        args: positional arguments of its forward pass.
        kwargs: keyword arguments.
        inputs: names of the input tensors; None for the exporter's names.
        outputs: names of the output tensors; None for the exporter's names.
        dynamic_shapes: as for ``torch.export.export``; None for fixed sizes.

    Raises:
        Exception: any error of the exporter, for a network that it cannot follow.
    """
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            network,
            args,
            kwargs=dict(kwargs),
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
            input_names=inputs,
            output_names=outputs,
        )
    assert program is not None
    return program.model_proto


def contiguous(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a network contiguous parameters, in place, and its arguments contiguous tensors.

    A file has no memory formats. The exporter writes those of some ops as gathers of single elements.

    Returns:
        The positional and keyword arguments.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()
    changed: Any = pytree.tree_map_only(Tensor, Tensor.contiguous, (tuple(args), dict(kwargs)))
    return changed[0], changed[1]


def write_model(model: Any, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an ``onnx.ModelProto``.

    Args:
        model: the model; ``metadata`` is added to it.
        path: the file.
        metadata: texts by key, stored as ``metadata_props``.

    Raises:
        ValueError: the model exceeds 2 GiB.
    """
    import onnx

    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    if model.ByteSize() > LARGEST:
        raise ValueError(
            f"network: got {model.ByteSize()} bytes, expected at most {LARGEST}, the limit of an ONNX file"
        )
    onnx.save(model, path)


def name_sizes(model: Any) -> None:
    """Name the dynamic sizes of an ``onnx.ModelProto`` in place: batch, height, width, or dim and number."""
    names: dict[str, str] = {}
    for entry in model.graph.input:
        dims = entry.type.tensor_type.shape.dim
        labels = ["batch", *(f"dim{n}" for n in range(1, len(dims)))]
        if len(dims) == 4:
            labels[2:] = ["height", "width"]
        for dim, label in zip(dims, labels, strict=True):
            if dim.dim_param and dim.dim_param not in names:
                taken = label in names.values()
                names[dim.dim_param] = f"{entry.name}_{label}" if taken else label
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: names.get(found[0], found[0]), dim.dim_param)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns and logs about its own code."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
