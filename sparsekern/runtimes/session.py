"""Running ONNX files and OpenVINO IR on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekern.runtimes.names import Runtime

Arrays = Mapping[str, NDArray[Any]]

# Nodes that change the memory layout at the borders of a model. Between the ops of a network there are few.
_BORDERS = ("ReorderInput", "ReorderOutput", "Reorder")


class Session:
    """A network in ONNX Runtime or OpenVINO, in the precision that the file states.

    Args:
        model: an ONNX file, the bytes of one, or an OpenVINO IR ``.xml`` (for OpenVINO only).
        runtime: ``"onnxruntime"`` or ``"openvino"``.
        threads: CPU threads; None for the runtime's choice.
        profile: whether :meth:`inner_seconds` is called.

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

    def inner_seconds(self, arrays: Arrays, passes: int) -> float:
        """Seconds of one pass without its borders; the lower quartile over ``passes``.

        The borders are the nodes that change the memory layout of the model's inputs and outputs, and the
        call of the runtime itself. With a single thread this is processor time, which other processes do not
        lengthen as they do wall time. Borders are short, so that their shortest wall time is right.
        """
        self._own.run(arrays)  # the first pass allocates
        busy, wall = [], []
        for _ in range(passes):
            begin, began = self._own.clock(), perf_counter()
            self._own.run(arrays)
            busy.append(self._own.clock() - begin)
            wall.append(perf_counter() - began)
            self._own.after_pass()
        every, borders = self._own.nodes(passes)
        call = max(0.0, float((np.array(wall) - every).min()))
        return max(0.0, float(np.quantile(busy, 0.25)) - call - float(borders.min()))


class _OnnxRuntime:
    def __init__(self, model: Path | bytes, threads: int | None, profile: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        # The only thread is that of the caller.
        self.clock = thread_time if threads == 1 else perf_counter
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

    def after_pass(self) -> None:
        """Nothing: the profile has all passes."""

    def nodes(self, passes: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Seconds of all nodes and of the borders in each of the last passes, float64 ``[passes]``."""
        every: dict[str, list[float]] = {}
        borders = set()
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                every.setdefault(event["name"], []).append(1e-6 * event["dur"])
                if event["args"].get("op_name") in _BORDERS:
                    borders.add(event["name"])
        last = {name: np.array(own[-passes:]) for name, own in every.items()}
        none = np.zeros(passes)
        return sum(last.values(), none), sum((last[name] for name in borders), none)


class _OpenVino:
    def __init__(self, model: Path | bytes, threads: int | None, profile: bool) -> None:
        import openvino

        core = openvino.Core()
        # Without the first hint, CPUs that compute bfloat16 would do so in a float32 network.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if profile:
            settings["PERF_COUNT"] = True
        # The only thread is one of OpenVINO.
        self.clock = process_time if threads == 1 else perf_counter
        read = core.read_model(model) if isinstance(model, bytes) else core.read_model(str(model))
        compiled = core.compile_model(read, "CPU", settings)
        self._request = compiled.create_infer_request()
        self._passes: list[tuple[float, float]] = []
        self.inputs = [port.get_any_name() for port in compiled.inputs]
        self.outputs = [port.get_any_name() for port in compiled.outputs]
        self.metadata = _rt_info(read)

    def run(self, arrays: Arrays) -> list[NDArray[Any]]:
        self._request.infer(dict(arrays))
        return [np.array(self._request.get_output_tensor(n).data) for n in range(len(self.outputs))]

    def after_pass(self) -> None:
        """Keep the profile of the last pass."""
        found = self._request.get_profiling_info()
        times = [(node.node_type in _BORDERS, node.real_time.total_seconds()) for node in found]
        self._passes.append((sum(own for _, own in times), sum(own for border, own in times if border)))

    def nodes(self, passes: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Seconds of all nodes and of the borders in each of the last passes, float64 ``[passes]``."""
        every, borders = np.array(self._passes[-passes:]).T
        return every, borders


def _rt_info(model: Any) -> dict[str, str]:
    """The texts that :func:`sparsekern.deploy.export` stores in an IR."""
    path = ["sparsekern"]
    return {"sparsekern": str(model.get_rt_info(path).astype(str))} if model.has_rt_info(path) else {}
