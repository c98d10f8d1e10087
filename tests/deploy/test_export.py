"""export: files that equal torch at all sizes that may change, and nothing in place of those that do not.

``python -m benchmarks.exports`` checks many more networks in the same way.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sparsekern
from benchmarks.export_networks import CASES
from sparsekern.deploy import files
from sparsekern.deploy.dynamic import check_dynamic, find_sizes
from sparsekern.runtimes import names
from sparsekern.runtimes.session import Session


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_outputs_of_any_form_get_names_and_equal_torch(tmp_path: Path) -> None:
    case = CASES["outputs"]
    network, path = case.network().train(), tmp_path / "network.onnx"
    found = sparsekern.export(network, path, case.example(), dynamic=True, metadata={"made": "here"})
    assert 0 <= found < 1e-5 and network.training
    run = session(path)
    assert [entry.name for entry in run.get_outputs()] == ["out", "parts_0", "parts_1", "list_0"]
    assert run.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert run.get_modelmeta().custom_metadata_map == {"made": "here"}
    x = torch.randn(4, 3, 20, 9)
    with torch.no_grad():
        expected = network.eval()(x)["parts"][0]
    np.testing.assert_allclose(run.run(["parts_0"], {"x": x.numpy()})[0], expected, rtol=0, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]


def test_two_inputs_share_the_batch_and_keyword_arguments_have_names(tmp_path: Path) -> None:
    case = CASES["two-inputs"]
    image, numbers = case.example()
    path = tmp_path / "network.onnx"
    sparsekern.export(case.network(), path, image, example_kwargs={"numbers": numbers})
    shapes = {entry.name: entry.shape for entry in session(path).get_inputs()}
    assert shapes == {"image": ["batch", 3, 16, 16], "numbers": ["batch", 4]}


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_an_ir_has_two_files_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "network.xml"
    # The exporter writes pooling in the channels-last format as gathers.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).eval()
    model.to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert sparsekern.export(model, path, image, metadata={"sparsekern": "{}"}) < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"network.xml", "network.bin"}
    found = Session(path, "openvino", 1)
    assert found.metadata == {"sparsekern": "{}"}
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        np.testing.assert_allclose(found.run({found.inputs[0]: x.numpy()})[0], model(x), rtol=0, atol=1e-5)


class Odd(nn.Module):
    """Pads sizes that are no multiple of 4, which a trace of other sizes does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 4, stride=4), nn.ConvTranspose2d(4, 3, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x))
        if y.shape[-1] != x.shape[-1] or y.shape[-2] != x.shape[-2]:
            y = nn.functional.pad(y, (0, x.shape[-1] - y.shape[-1], 0, x.shape[-2] - y.shape[-2]))
        return x + y


def test_the_stride_of_a_network_is_found_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"^dynamic: .* multiples of 4 alone are right"):
        sparsekern.export(Odd(), tmp_path / "network.onnx", torch.randn(1, 3, 8, 8), dynamic="size")
    with pytest.raises(
        ValueError, match=r"^network: onnxruntime does not run the exported file on \[1, 3, 10, 12\]"
    ):
        sparsekern.export(Odd(), tmp_path / "other.onnx", torch.randn(1, 3, 8, 8), dynamic="size", stride=2)
    assert not (tmp_path / "other.onnx").exists()


def changed(model: Any) -> None:
    """Adds one to the bias of the layer ``side``."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("side.bias"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + 1, tensor.name))


def test_a_file_that_differs_is_refused_with_output_and_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(b"an older file")
    case = CASES["outputs"]
    monkeypatch.setattr(files, "name_sizes", changed)
    with pytest.raises(
        ValueError,
        match=r"^network: got output 'parts_0' on \[1, 3, 32, 32\] with a difference of "
        r"\d\.\de[-+]\d\d of its largest in onnxruntime, expected at most 1e-05; nothing was written",
    ):
        sparsekern.export(case.network(), path, case.example(), dynamic=False)
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    assert path.read_bytes() == b"an older file"


class Fixed(nn.Module):
    """Runs at one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, 3, 8, 8) + torch.zeros(1, 1, 8, 8)


class Branch(nn.Module):
    """Decides by a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


image = torch.randn(1, 3, 8, 8)
BAD: dict[str, tuple[Any, str, Any, dict[str, Any], str]] = {
    "no module": (3, "a.onnx", image, {}, "network: got int, expected a torch.nn.Module"),
    "a suffix": (
        Odd(),
        "a.pt",
        image,
        {},
        "path: got .*a.pt'.*, expected a name that ends in .onnx, or in .xml",
    ),
    "no directory": (Odd(), "none/a.onnx", image, {}, "path: cannot write"),
    "unknown sizes": (
        Odd(),
        "a.onnx",
        image,
        {"dynamic": "depth"},
        "dynamic: got 'depth', expected True, False",
    ),
    "no sizes": (
        nn.Linear(3, 3),
        "a.onnx",
        torch.ones(2, 3),
        {"dynamic": True},
        "dynamic: got 'size', expected an",
    ),
    "one size": (
        Fixed(),
        "a.onnx",
        image,
        {"dynamic": "size"},
        "dynamic: got 'size', expected a network that runs",
    ),
    "one batch": (
        Fixed(),
        "a.onnx",
        image,
        {},
        "dynamic: got 'batch', expected a network that runs on a batch of 3",
    ),
    "a stride": (
        Odd(),
        "a.onnx",
        image,
        {"dynamic": True, "stride": 0},
        "stride: got 0, expected a whole number",
    ),
    "no tensor": (Odd(), "a.onnx", (), {}, "example_inputs: got arguments that Odd.forward does not take"),
    "names": (
        Odd(),
        "a.onnx",
        image,
        {"outputs": ["a", "b"]},
        "outputs: got ['a', 'b'], expected 1 different names",
    ),
    "a branch": (
        Branch(),
        "a.onnx",
        image,
        {"dynamic": False},
        "network: got a Branch that cannot be exported",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    network, name, x, options, message = BAD[case]
    message = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises((TypeError, ValueError, OSError), match=f"^{message}"):
        sparsekern.export(network, tmp_path / name, x, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda module: None)
    for suffix, extra in ((".onnx", "onnx"), (".xml", "openvino")):
        with pytest.raises(ModuleNotFoundError, match=rf'^path: got .* pip install "sparsekern\[{extra}\]"$'):
            sparsekern.export(Odd(), tmp_path / f"a{suffix}", image)


def test_dynamic_sizes_are_checked_with_other_sizes_than_traced() -> None:
    assert check_dynamic(True) == check_dynamic(["size", "batch"]) == ("batch", "size")
    ids = torch.tensor([[5, 1, 2]])
    found = find_sizes(nn.Embedding(6, 2), (ids,), {}, ("batch",), None)
    assert found.traced[0][0].shape == (2, 3)
    (_, other) = found.checked
    assert other[0][0].shape == (3, 3) and set(other[0][0].unique().tolist()) == {1, 2, 5}
    assert not torch.equal(other[0][0][0], other[0][0][1])
