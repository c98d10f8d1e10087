"""Running ONNX files and OpenVINO IR on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekern.runtimes.names import Runtime

Arrays = Mapping[str, NDArray[Any]]

# Nodes that change the memory layout at the borders of a model. Between the ops of a network there are none.
_BORDERS = ("ReorderInput", "ReorderOutput", "Reorder")


class Session:
    """A network in ONNX Runtime or OpenVINO, in the precision that the file states.

    Args:
        model: an ONNX file, the bytes of one, or an OpenVINO IR ``.xml`` (for OpenVINO only).
        runtime: ``"onnxruntime"`` or ``"openvino"``.
        threads: CPU threads; None for the runtime's choice.
        profile: whether :meth:`node_seconds` is called.

    Attributes:
        inputs: names of the inputs in the order of the file.
        outputs: names of the outputs in the order of the file.
        metadata: texts in the file by key.
    """

    def __init__(
        self, model: Path | bytes, runtime: Runtime, threads: int | None = None, *, profile: bool = False
    ) -> None:
        make = _OnnxRuntime if runtime == "onnxruntime" else _OpenVino
        self._own: _OnnxRuntime | _OpenVino = make(model, threads, profile)
        self.inputs, self.outputs = self._own.inputs, self._own.outputs
        self.metadata = self._own.metadata

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        """The outputs for inputs by name.

        Raises:
            Exception: any error of the runtime, such as for inputs of another shape.
        """
        return self._own.run(arrays)

    def bound(self, arrays: Arrays) -> Callable[[], Any]:
        """A function that runs the network on ``arrays``; for measurements of time."""
        return lambda: self._own.run(arrays)

    def node_seconds(self, arrays: Arrays, passes: int) -> dict[str, list[float]]:
        """Seconds of each node of the optimised network in each of ``passes``, by name of the node.

        Nodes that only change the memory layout of the model's inputs and outputs are left out.
        """
        return self._own.node_seconds(arrays, passes)


class _OnnxRuntime:
    def __init__(self, model: Path | bytes, threads: int | None, profile: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        self._folder = tempfile.TemporaryDirectory() if profile else None
        if self._folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        source = model if isinstance(model, bytes) else str(model)
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = [entry.name for entry in self._session.get_inputs()]
        self.outputs = [entry.name for entry in self._session.get_outputs()]
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = self._session.run(None, dict(arrays))
        return found

    def node_seconds(self, arrays: Arrays, passes: int) -> dict[str, list[float]]:
        for _ in range(passes + 1):
            self.run(arrays)
        events = json.loads(Path(self._session.end_profiling()).read_text())
        times: dict[str, list[float]] = {}
        for event in events:
            kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            if kernel and event["args"].get("op_name") not in _BORDERS:
                times.setdefault(event["name"], []).append(1e-6 * event["dur"])
        return {name: own[1:] for name, own in times.items()}  # the first pass allocates


class _OpenVino:
    def __init__(self, model: Path | bytes, threads: int | None, profile: bool) -> None:
        import openvino

        core = openvino.Core()
        # Without the hint, CPUs that compute bfloat16 would do so in a float32 network.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if profile:
            settings["PERF_COUNT"] = True
        read = core.read_model(model) if isinstance(model, bytes) else core.read_model(str(model))
        compiled = core.compile_model(read, "CPU", settings)
        self._request = compiled.create_infer_request()
        self.inputs = [port.get_any_name() for port in compiled.inputs]
        self.outputs = [port.get_any_name() for port in compiled.outputs]
        self.metadata = _rt_info(read)
        self._count = len(compiled.outputs)

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        self._request.infer(dict(arrays))
        return [np.array(self._request.get_output_tensor(index).data) for index in range(self._count)]

    def node_seconds(self, arrays: Arrays, passes: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {}
        self.run(arrays)
        for _ in range(passes):
            self._request.infer(dict(arrays))
            for node in self._request.get_profiling_info():
                if node.node_type not in _BORDERS:
                    times.setdefault(node.node_name, []).append(node.real_time.total_seconds())
        return times


def _rt_info(model: Any) -> dict[str, str]:
    """The texts that :func:`sparsekern.deploy.export` stores in an IR."""
    path = ["sparsekern"]
    return {"sparsekern": str(model.get_rt_info(path).astype(str))} if model.has_rt_info(path) else {}
