"""Exporting stored networks to ONNX; each file is run and compared with torch before it is kept."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

import sparsekern
from sparsekern.files.atomic import replacing, target
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.predict import Segmenter

INPUT, OUTPUT = "image", "logits"
# Allowed difference over the largest output. Both programs compute in float32, in different orders.
TOLERANCE = 1e-4
# Size limit of a single ONNX file: 2 GiB.
LARGEST = (1 << 31) - 1


def export(segmenter: Segmenter, path: Path) -> float:
    """Write the network to `path` as ONNX with dynamic batch size, height and width.

    The input is `image`, float32 `[N, 3, H, W]`, normalised with the values in the file's metadata. Height
    and width are multiples of the network's stride. The output is `logits`, `[N, 1 or classes, H, W]`.
    onnxruntime runs the file on batches of several sizes, and the file appears under its name only if the
    outputs equal torch's.

    Returns:
        The largest difference to torch's outputs, over the largest output.

    Raises:
        InputError: the outputs differ, or the network exceeds 2 GiB; nothing is written.
        OSError: `path` cannot be written.
    """
    destination = target(path)
    network = segmenter.network.network
    stride = segmenter.spec.stride
    random = torch.Generator().manual_seed(0)
    sizes = ((2, 2, 3), (1, 1, 1), (3, 4, 2))
    batches = [torch.randn(n, 3, stride * h, stride * w, generator=random) for n, h, w in sizes]
    with replacing(destination) as temporary:
        program = _program(network, batches[0].to(segmenter.device), stride)
        program.metadata_props.add(
            key="sparsekern", value=json.dumps(segmenter.spec.to_json(sparsekern.__version__))
        )
        if program.ByteSize() > LARGEST:
            raise InputError("MODEL: got a network above 2 GiB, expected one that fits in an ONNX file")
        onnx.save(program, temporary)
        difference = _compare(network, temporary, batches, segmenter.device)
        if not difference <= TOLERANCE:
            raise InputError(
                f"export: onnxruntime differs from torch by {difference:.1e} of the largest output, expected "
                f"at most {TOLERANCE:.0e}; nothing was written to {path}"
            )
    return difference


def _program(network: nn.Module, example: Tensor, stride: int) -> Any:
    """The network as an `onnx.ModelProto`."""
    sizes = {0: Dim("batch"), 2: stride * Dim("rows"), 3: stride * Dim("columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            verbose=False,
            dynamic_shapes=(sizes,),
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    assert program is not None
    return program.model_proto


@torch.inference_mode()
def _compare(network: nn.Module, path: Path, batches: list[Tensor], device: torch.device) -> float:
    """The largest difference over the largest output; infinite if an output is not finite."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences, largest = [], 0.0
    for batch in batches:
        expected = network(batch.to(device)).cpu().numpy()
        (found,) = session.run([OUTPUT], {INPUT: batch.numpy()})
        if found.shape != expected.shape or not np.isfinite(found).all():
            return float("inf")
        differences.append(float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    return max(differences) / largest if largest else max(differences)
