"""Writing networks for other runtimes; a file is kept only after its runtime gave torch's numbers."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.compact import Plan, compact
from sparsekern.compact.verify import as_arguments
from sparsekern.deploy.dynamic import Example, Sizes, check_dynamic, find_sizes
from sparsekern.deploy.simplify import remove_hooks, settle_weights
from sparsekern.deploy.values import Difference, compare, in_order, input_names, output_names
from sparsekern.distributed.tensors import unwrap
from sparsekern.files.atomic import replacing, target
from sparsekern.graph.capture.courses import first_line
from sparsekern.runtimes import Runtime, require
from sparsekern.runtimes.onnx_file import contiguous, name_sizes, onnx_model, write_model
from sparsekern.runtimes.session import Session

# Allowed difference over the largest magnitude of an output. Both programs round, in different orders.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-5

_RUNTIMES: dict[str, Runtime] = {".onnx": "onnxruntime", ".xml": "openvino"}


def export(
    network: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic: str | Sequence[str] | bool = ("batch",),
    stride: int | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    tolerance: float | None = None,
) -> float:
    """Write a network as ONNX (``.onnx``) or OpenVINO IR (``.xml``), and run the file to check it.

    The file has the network in evaluation mode. ONNX Runtime or OpenVINO runs it on the example, and where
    sizes are dynamic on another batch size, height and width. The file appears under its name only if all
    outputs equal those of torch. An IR has two files, ``NAME.xml`` and ``NAME.bin``.

    Args:
        network: the network, compact or not; it stays as it is.
        path: the file to write.
        example_inputs: a tensor or a tuple of the positional arguments. Arguments that are not tensors
            become constants of the file.
        example_kwargs: keyword arguments.
        dynamic: ``"batch"``: the first dimension of inputs that have it in common may change. ``"size"``:
            the dimensions from the third on of inputs with at least four may change, such as height and
            width. A sequence of both, True for both, False for none.
        stride: with ``"size"``, sizes are multiples of it; None for the smallest power of two, up to 128,
            with which the file equals torch.
        inputs: names of the tensors that the network reads; default those of its forward.
        outputs: names of the tensors that it returns; default ``output`` for one, else keys, fields or
            numbers.
        metadata: texts that the file carries, such as the normalisation of images.
        tolerance: largest difference allowed, over the largest magnitude of an output. Default: 1e-5, for
            float16 1e-2, for bfloat16 5e-2.

    Returns:
        The largest difference found, over the largest magnitude of its output.

    Raises:
        ModuleNotFoundError: a library is missing; the message names the extra that installs it.
        TypeError: ``network`` is not a module.
        ValueError: the suffix of ``path`` or another argument is none of those above; the network cannot
            be exported; it does not run at another size; or an output differs, which the message names with
            the largest difference. Nothing is written.
        OSError: ``path`` cannot be written.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}, expected a torch.nn.Module")
    runtime = _runtime_of(path)
    changing = check_dynamic(dynamic)
    require(runtime, "path")
    destination = target(path)
    args, kwargs = as_arguments(example_inputs, example_kwargs)
    kwargs = in_order(network, args, kwargs)
    copy = compact(unwrap(network), Plan({})).eval()
    limit = _tolerance(copy) if tolerance is None else tolerance
    with torch.no_grad():
        settle_weights(copy)
        remove_hooks(copy)
        args, kwargs = contiguous(copy, args, kwargs)
        sizes = find_sizes(copy, args, kwargs, changing, stride)
        names = input_names(copy, args, kwargs, inputs), output_names(copy, args, kwargs, outputs)
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / f"model{destination.suffix}"
            _build(copy, built, sizes, names, metadata or {})
            difference = _check(copy, built, runtime, sizes, names, limit)
            _move(built, destination)
    return difference.value


def _runtime_of(path: str | os.PathLike[str]) -> Runtime:
    """The runtime of a file, by its suffix."""
    suffix = Path(os.fspath(path)).suffix if isinstance(path, (str, os.PathLike)) else ""
    if suffix not in _RUNTIMES:
        raise ValueError(f"path: got {path!r}, expected a name that ends in .onnx, or in .xml for OpenVINO")
    return _RUNTIMES[suffix]


def _tolerance(network: nn.Module) -> float:
    """The tolerance for the least precise dtype of the network's parameters."""
    dtypes = {parameter.dtype for parameter in network.parameters()}
    return max((TOLERANCES.get(dtype, TOLERANCE) for dtype in dtypes), default=TOLERANCE)


def _build(
    network: nn.Module,
    path: Path,
    sizes: Sizes,
    names: tuple[Sequence[str], Sequence[str]],
    metadata: Mapping[str, str],
) -> None:
    """Write the file of a network.

    Raises:
        ValueError: the exporter or OpenVINO cannot follow the network; the message has its first line.
    """
    args, kwargs = sizes.traced
    try:
        model = onnx_model(
            network, args, kwargs, inputs=names[0], outputs=names[1], dynamic_shapes=sizes.dynamic_shapes
        )
    except Exception as error:
        # The exporter raises errors of many classes.
        raise ValueError(
            f"network: got a {type(network).__name__} that cannot be exported ({first_line(error)}), "
            f"expected one that torch.onnx.export follows with dynamic {sizes.text}; try dynamic=False"
        ) from error
    name_sizes(model)
    if path.suffix == ".onnx":
        write_model(model, path, metadata)
        return
    import openvino

    source = path.with_suffix(".onnx")
    write_model(model, source)
    try:
        read = openvino.Core().read_model(str(source))
    except Exception as error:
        raise ValueError(f"network: OpenVINO cannot read it ({first_line(error)})") from error
    for key, text in metadata.items():
        read.set_rt_info(text, [key])
    # The IR keeps the precision of the network.
    openvino.save_model(read, str(path), compress_to_fp16=False)
    source.unlink()


def _check(
    network: nn.Module,
    path: Path,
    runtime: Runtime,
    sizes: Sizes,
    names: tuple[Sequence[str], Sequence[str]],
    limit: float,
) -> Difference:
    """The largest difference between torch and the file.

    Raises:
        ValueError: it is above ``limit``, or the runtime cannot load or run the file.
    """
    try:
        session = Session(path, runtime)
    except Exception as error:
        raise ValueError(f"network: {runtime} cannot load what was exported ({first_line(error)})") from error

    def difference(example: Example) -> Difference:
        found = compare(network, session, *example, names, runtime)
        if not found.value <= limit:
            raise ValueError(
                f"network: got {found} in {runtime}, expected at most {limit:.0e}; nothing was written"
            )
        return found

    every = [difference(example) for example in sizes.checked]
    if sizes.larger:
        every.append(_of_smallest_stride(sizes.larger, difference))
    return max(every, key=lambda found: found.value)


def _of_smallest_stride(
    larger: Mapping[int, Example], difference: Callable[[Example], Difference]
) -> Difference:
    """The difference at the smallest stride at which the file equals torch.

    A forward may treat some sizes in another way, for example by padding. A trace follows one of the ways.

    Raises:
        ValueError: it equals torch at none of them.
    """
    problem: ValueError | None = None
    for stride, example in larger.items():
        try:
            found = difference(example)
        except ValueError as error:
            problem = problem or error
            continue
        if problem is not None:
            warnings.warn(
                f"dynamic: the forward treats other sizes in another way, so heights and widths that differ "
                f"from the example's by multiples of {stride} alone are right in the file",
                stacklevel=5,
            )
        return found
    assert problem is not None
    raise problem


def _move(built: Path, destination: Path) -> None:
    """Copy the finished files to their places, each as a whole; the ``.xml`` of an IR comes last."""
    suffixes = [".xml", ".bin"] if built.suffix == ".xml" else [built.suffix]
    with ExitStack() as stack:
        for suffix in suffixes:
            temporary = stack.enter_context(replacing(destination.with_suffix(suffix)))
            shutil.copyfile(built.with_suffix(suffix), temporary)
