"""Opens folders with transformers alone: sparsekern cannot be imported in this process.

``python -I benchmarks/stock_reader.py CASES.pt`` reads a list of (class, folder, inputs, tokens), opens each
folder by ``class.from_pretrained``, and writes the outputs of a forward pass and the tokens of ``generate``
to ``CASES.pt.read``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

if __name__ == "__main__":
    # A module that is None cannot be imported. A torchvision that does not fit torch breaks transformers.
    sys.modules["sparsekern"] = sys.modules["torchvision"] = None  # type: ignore[assignment]


def run(model: Any, inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """The logits of a model in evaluation mode, and ``count`` tokens that it generates, if more than 0."""
    found = {}
    with torch.no_grad():
        found["logits"] = model.eval()(**inputs).logits
        if count:
            length = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            found["tokens"] = model.generate(inputs["input_ids"], **length)
    return found


def main() -> None:
    import transformers

    found = []
    for kind, folder, inputs, count in torch.load(sys.argv[1], weights_only=True):
        model = getattr(transformers, kind).from_pretrained(folder)
        found.append({**run(model, inputs, count), "class": type(model).__name__})
    torch.save(found, f"{sys.argv[1]}.read")


if __name__ == "__main__":
    main()
