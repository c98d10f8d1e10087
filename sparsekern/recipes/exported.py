"""Running the ONNX and OpenVINO files that `sparsekern export` wrote."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekern.files.atomic import opened, parse_json
from sparsekern.graph.capture.courses import first_line
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.networks import NetworkSpec
from sparsekern.runtimes import Runtime, require
from sparsekern.runtimes.session import Session

# Names in the files.
INPUT, OUTPUT, METADATA = "image", "logits", "sparsekern"
RUNTIMES: dict[str, Runtime] = {".onnx": "onnxruntime", ".xml": "openvino"}


class Exported(nn.Module):
    """The network of an exported file, run by ONNX Runtime or OpenVINO with torch's number of threads.

    Shapes: float32 `[N, 3, H, W]` on the CPU, `H` and `W` multiples of the stride, to logits of that size.

    Args:
        path: the file.

    Attributes:
        spec: description of the network, from the file's metadata.

    Raises:
        OSError: the file cannot be read.
        InputError: it is damaged, or `sparsekern export` did not write it.
        ModuleNotFoundError: the runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._runtime = RUNTIMES[path.suffix]
        require(self._runtime, "MODEL")
        where = f"MODEL: {os.fspath(path)!r}"
        with opened(path, "MODEL"):
            pass
        try:
            self._session = Session(path, self._runtime, torch.get_num_threads())
        except Exception as error:
            # The runtimes raise errors of many classes.
            raise InputError(
                f"{where} cannot be loaded by {self._runtime} ({first_line(error)}), expected a file that "
                "sparsekern export wrote"
            ) from None
        if METADATA not in self._session.metadata or self._session.inputs != [INPUT]:
            raise InputError(f"{where} was not written by sparsekern export, it does not say what it reads")
        try:
            self.spec = NetworkSpec.from_json(parse_json(self._session.metadata[METADATA]))
        except ValueError as error:
            raise InputError(f"{where}: {str(error).removeprefix('--')}") from None

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch.

        Raises:
            InputError: the runtime fails.
        """
        try:
            (found,) = self._session.run({INPUT: x.contiguous().numpy()})
        except Exception as error:
            raise InputError(f"MODEL: {self._runtime} does not run it ({first_line(error)})") from error
        return torch.from_numpy(found)
