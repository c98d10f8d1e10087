"""The commands that use the files of a training: predict, evaluate, export."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import sparsekern
from sparsekern.cli import run
from sparsekern.deploy import files, speed
from sparsekern.recipes import export as exporting
from sparsekern.recipes.data import normalise
from sparsekern.recipes.networks import NetworkSpec
from sparsekern.recipes.predict import Segmenter, find_images


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def picture(path, height, width, seed=0):
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def three(tmp_path):
    """A file of a network of three classes that was never trained."""
    spec = NetworkSpec("unet", 2, 3, "bilinear", 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    torch.manual_seed(0)
    path = tmp_path / "three.safetensors"
    sparsekern.save(spec.build(), path, made_by=spec.to_json("0"))
    return path


def test_predict_writes_a_mask_of_each_images_size(trained, data, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    sizes = {"a": (48, 48), "b": (37, 51), "c": (1, 3), "d": (4, 129)}
    for index, (name, size) in enumerate(sizes.items()):
        picture(folder / f"{name}.png", *size, seed=index)
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "masks"
    assert run(["predict", str(trained), str(folder), "--out", str(out), "--overlay"]) == 0
    assert "4 masks" in capsys.readouterr().out
    masks = {f"{name}.png" for name in sizes}
    assert {path.name for path in out.iterdir()} == masks | {f"{name}_overlay.png" for name in sizes}
    found = set()
    for name, size in sizes.items():
        mask = pixels(out / f"{name}.png")
        assert mask.shape == size and mask.dtype == np.uint8
        found |= set(np.unique(mask))
        overlay = pixels(out / f"{name}_overlay.png")
        changed = (overlay != pixels(folder / f"{name}.png")).any(-1)
        assert overlay.shape == (*size, 3)
        assert not (changed & (mask == 0)).any()
    assert found == {0, 255}


def test_masks_are_what_the_network_says_and_more_classes_keep_their_numbers(three, tmp_path):
    image = picture(tmp_path / "image.png", 20, 27)
    assert run(["predict", str(three), str(image), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    found = pixels(tmp_path / "out" / "image.png")
    network = sparsekern.load(three)
    x = normalise(pixels(image)[None], (0.5, 0.4, 0.3), (0.2, 0.3, 0.1))
    x = torch.nn.functional.pad(x, (0, 5, 0, 4), mode="replicate")
    with torch.no_grad():
        expected = network(x).argmax(1)[0, :20, :27].numpy()
    assert np.array_equal(found, expected) and len(np.unique(found)) > 1


def test_evaluate_scores_the_masks_that_predict_writes_as_run_json_does(trained, data, tmp_path, capsys):
    assert run(["evaluate", str(trained / "model.safetensors"), "--data", str(data), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    figures = json.loads((trained / "run.json").read_text())["figures"]
    assert (scores["dice"], scores["miou"]) == (figures["dice"], figures["miou"])
    images = str(data / "test" / "images" / "*.png")
    assert run(["predict", str(trained), images, "--out", str(tmp_path), "--quiet"]) == 0
    truths = sorted((data / "test" / "masks").iterdir())
    truth = np.concatenate([pixels(path).ravel() > 0 for path in truths])
    found = np.concatenate([pixels(tmp_path / path.name).ravel() > 0 for path in truths])
    assert scores["images"] == len(truths) == 3
    assert scores["dice"] == pytest.approx(2 * (truth & found).sum() / (truth.sum() + found.sum()))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert run(["export", str(trained), str(path)]) == 0
    return path


def test_an_exported_network_takes_any_batch_and_any_multiple_of_the_stride(trained, exported):
    path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    network = sparsekern.load(trained / "model.safetensors")
    for shape in ((1, 3, 4, 4), (5, 3, 12, 64)):
        x = torch.randn(shape)
        (found,) = session.run(None, {"image": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-4)
    (entry,) = onnx.load(path).metadata_props
    assert entry.key == "sparsekern" and json.loads(entry.value)["recipe"] == "unet"


def test_an_exported_network_that_differs_is_refused_with_the_difference(trained, tmp_path, monkeypatch):
    def wrong(model):
        for tensor in model.graph.initializer:
            if tensor.name == "head.bias":
                changed = onnx.numpy_helper.to_array(tensor) + 1
                tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))

    monkeypatch.setattr(files, "name_sizes", wrong)
    message = r"output 'logits' on .* difference of \d\.\de[-+]\d\d .* expected at most 1e-05"
    with pytest.raises(ValueError, match=message):
        exporting.export(Segmenter(trained / "model.safetensors"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_predict_and_evaluate_run_an_exported_network(trained, exported, data, tmp_path, capsys):
    images = str(data / "test" / "images")
    masks = []
    for model, out in ((trained, tmp_path / "torch"), (exported, tmp_path / "onnx")):
        assert run(["predict", str(model), images, "--out", str(out), "--quiet", "--threads", "1"]) == 0
        masks.append(np.stack([pixels(path) for path in sorted(out.iterdir())]))
    # The logits differ by rounding, which may turn a pixel.
    assert (masks[0] != masks[1]).mean() < 1e-3
    capsys.readouterr()
    assert run(["evaluate", str(exported), "--data", str(data), "--json"]) == 0
    figures = json.loads((trained / "run.json").read_text())["figures"]
    assert json.loads(capsys.readouterr().out)["dice"] == pytest.approx(figures["dice"], abs=1e-3)


def test_an_exported_file_is_checked_before_it_is_used(exported, data, tmp_path, capsys):
    images = [str(data / "test" / "images"), "--out", str(tmp_path / "out")]
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported.read_bytes()[:200])
    bare = tmp_path / "bare.onnx"
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, bare)
    cases = {
        damaged: "cannot be loaded by onnxruntime",
        bare: "was not written by sparsekern export",
        tmp_path / "none.onnx": "cannot read",
    }
    for path, message in cases.items():
        assert run(["predict", str(path), *images]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: MODEL: ") and message in error and error.count("\n") == 1
    assert run(["predict", str(exported), *images, "--device", "meta"]) == 2
    assert run(["export", str(exported), str(tmp_path / "again.onnx")]) == 2
    assert "is exported already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "again.onnx").exists()


def test_images_are_found_once_in_files_directories_and_patterns(data):
    folder = data / "test" / "images"
    names = [path.name for path in find_images([str(folder / "0001.png"), str(folder), f"{folder}/*1.png"])]
    assert names == ["0001.png", "0000.png", "0002.png"]


BAD = {
    "no model": (["nothing.safetensors"], "cannot read 'nothing.safetensors'"),
    "no image": (["{run}", "none/*.png"], "IMAGES: got 'none/*.png', expected an image"),
    "two of one name": (["{run}", "{data}/test/images", "{data}/train/images"], "would both be written to"),
    "onto the images": (
        ["{run}", "{data}/test/images", "--out", "{data}/test/images"],
        "would replace an image",
    ),
    "device": (["{run}", "{data}/test/images", "--device", "abacus"], "--device: got 'abacus', expected one"),
    "no picture": (["{run}", "{run}/run.json"], "run.json cannot be read as an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_predict_is_one_line_and_writes_nothing(
    trained, data, tmp_path, capsys, monkeypatch, case
):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(run=trained, data=data) for text in arguments]
    if len(arguments) == 1:
        arguments.append(str(data / "test" / "images"))
    if "--out" not in arguments:
        arguments += ["--out", "out"]
    before = {path: path.read_bytes() for path in data.rglob("*.png")}
    assert run(["predict", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path: path.read_bytes() for path in data.rglob("*.png")} == before


def test_a_file_of_another_normalisation_is_not_scored(three, data, capsys):
    assert run(["evaluate", str(three), "--data", str(data)]) == 2
    assert "MODEL: got one for images of mean (0.5, 0.4, 0.3)" in capsys.readouterr().err
    assert run(["evaluate", str(three), "--data", str(data), "--split", "all"]) == 2
    assert "--split: got 'all', expected" in capsys.readouterr().err


def test_export_wants_the_ending_of_onnx(trained, tmp_path, capsys):
    assert run(["export", str(trained), str(tmp_path / "model.pt")]) == 2
    assert "FILE: got" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_latency_times_dense_and_compact_in_the_runtimes_asked_for(trained, capsys, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "SHORTEST", 0.0)
    options = ["--size", "32", "--batch", "2", "--threads", "1"]
    assert (
        run(["latency", str(trained), *options, "--runtime", "torch", "--runtime", "onnxruntime", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert [(entry["runtime"], entry["batch"], entry["threads"]) for entry in found] == [
        ("torch", 2, 1),
        ("onnxruntime", 2, 1),
    ]
    assert all(0 < entry[name] < 10 for entry in found for name in ("dense", "compact"))
    assert run(["latency", str(trained), *options, "--runtime", "torch"]) == 0
    text = capsys.readouterr().out
    assert "1 thread" in text and "dense" in text and "x" in text
    for bad, message in (
        (["--size", "33"], "--size: got 33"),
        (["--runtime", "tvm"], "--runtime: got 'tvm'"),
    ):
        assert run(["latency", str(trained), *options, *bad]) == 2
        assert message in capsys.readouterr().err
