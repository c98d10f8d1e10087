"""Exporting stored networks to ONNX and OpenVINO; each file is compared with torch before it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import sparsekern
from sparsekern.recipes.exported import INPUT, METADATA, OUTPUT
from sparsekern.recipes.predict import Segmenter


def export(segmenter: Segmenter, path: Path) -> float:
    """Write the network to `path` as ONNX or OpenVINO IR, with dynamic batch size, height and width.

    The input is `image`, float32 `[N, 3, H, W]`, normalised with the values in the file's metadata. Height
    and width are multiples of the network's stride. The output is `logits`, `[N, 1 or classes, H, W]`.

    Returns:
        The largest difference to torch's outputs, over the largest output.

    Raises:
        ValueError: see `sparsekern.export`; nothing is written.
        OSError: `path` cannot be written.
    """
    stride = segmenter.spec.stride
    random = torch.Generator().manual_seed(0)
    example = torch.randn(1, 3, 2 * stride, 3 * stride, generator=random).to(segmenter.device)
    return sparsekern.export(
        segmenter.network.network,
        path,
        example,
        dynamic=True,
        stride=stride,
        inputs=[INPUT],
        outputs=[OUTPUT],
        metadata={METADATA: json.dumps(segmenter.spec.to_json(sparsekern.__version__))},
    )
