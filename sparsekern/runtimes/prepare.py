"""A network as a function without arguments that runs it once in a runtime; for measurements of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekern._copying import copied
from sparsekern.runtimes.names import Runtime
from sparsekern.runtimes.onnx_file import contiguous, onnx_model
from sparsekern.runtimes.session import Session

# Networks of one class that may be compiled in one process. torch counts them by their common code.
_MOST_COMPILED = 256


def prepare(
    network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], runtime: Runtime, threads: int
) -> Callable[[], Any]:
    """A function that runs ``network`` once on its arguments; it has run once already.

    Args:
        network: the network in evaluation mode. ``"onnxruntime"`` and ``"openvino"`` run a copy of it on
            the CPU, from an ONNX model in memory.
        args: positional arguments.
        kwargs: keyword arguments.
        runtime: where it runs.
        threads: CPU threads of ``"onnxruntime"`` and ``"openvino"``; torch has its own setting.

    Raises:
        Exception: any error of the exporter or of the runtime, for a network that it cannot run.
    """
    run: Callable[[], Any]
    if runtime == "torch":
        run = partial(network, *args, **kwargs)
    elif runtime == "compile":
        return _compiled(network, args, kwargs)
    else:
        network = copied(network)
        args, kwargs = contiguous(network, args, kwargs)
        model = onnx_model(network, args, kwargs).SerializeToString()
        session = Session(model, runtime, threads)
        tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        arrays = {name: t.detach().cpu().numpy() for name, t in zip(session.inputs, tensors, strict=False)}
        run = partial(session.run, arrays)
    run()
    return run


def _compiled(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    run = partial(torch.compile(network, dynamic=False), *args, **kwargs)
    with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILED):
        run()
    return run
