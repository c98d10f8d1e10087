"""Importing torchvision where its operators do not fit the torch beside it.

A torchvision that was built for another torch (the CPU build beside a CUDA one, say) fails to import for
want of two schemas; with these it succeeds, and its networks need none of its operators. To be imported
before torchvision is, directly or by another package; does nothing where torchvision is not installed.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # a schema lives as long as its library object

if find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for _schema in _SCHEMAS:
            _library.define(_schema)
