from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipes.folders import assert_same_network, write_data

from sparsekern import info as _info
from sparsekern.cli import run
from sparsekern.kernels import native

SMALL = [
    "--width",
    "3",
    "--depth",
    "2",
    "--steps",
    "12",
    "--batch",
    "2",
    "--crop",
    "32",
    "--evaluations",
    "1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("cli") / "data")


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def shell(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_demo_compares_dense_and_pruned_and_draws(tmp_path, capsys):
    command = ["demo", "--out", str(tmp_path), "--width", "3", "--steps", "12", "--images", "4"]
    assert run([*command, "--round-to", "1"]) == 0
    text = capsys.readouterr().out
    for row in (
        "parameters",
        "MACs",
        "file size",
        "CPU latency",
        "foreground Dice",
        "in the optimizer",
    ):
        assert row in text
    assert "compact equals masked" in text
    for name in ("curves.png", "predictions.png"):
        assert min(size(tmp_path / name)) > 500
    figures = {
        name: json.loads((tmp_path / name / "run.json").read_text())["figures"]
        for name in ("dense", "pruned")
    }
    assert figures["pruned"]["macs"] <= 0.2 * figures["dense"]["macs"]


@pytest.mark.parametrize("more", [["--no-shrink"], ["--shrink", "--round-to", "2"]], ids=["masked", "shrunk"])
def test_train_writes_everything_and_resumes_to_the_same_network(data, tmp_path, capsys, more):
    command = ["train", "--data", str(data), *SMALL, "--keep", "0.5", "--of", "params", *more]
    assert run([*command, "--out", str(tmp_path / "a")]) == 0
    assert "full size" in capsys.readouterr().out
    names = {"run.json", "model.safetensors", "checkpoint.pt", "curves.png"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    content = json.loads((tmp_path / "a" / "run.json").read_text())
    assert content["arguments"]["keep"] == 0.5 and content["arguments"]["data"] == str(data)
    assert content["settings"]["shrink"] == ("--shrink" in more)
    assert (content["figures"]["training_macs_share"] < 1) == ("--shrink" in more)
    assert content["figures"]["parameters"] <= 0.5 * content["figures"]["full"]["parameters"]

    second = [*command, "--out", str(tmp_path / "b")]
    assert run([*second, "--stop-after", "5"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert run(["train", "--resume", str(tmp_path / "b")]) == 0
    paths = [tmp_path / directory / "model.safetensors" for directory in "ab"]
    assert_same_network(*paths)


def test_train_dense_mobilenet(data, tmp_path, capsys):
    command = ["train", "--data", str(data), "--model", "mobilenetv3-small", "--dense"]
    command += ["--width", "0.25", "--steps", "2", "--batch", "2", "--crop", "32", "--evaluations", "1"]
    assert run([*command, "--out", str(tmp_path)]) == 0
    assert "dense" in capsys.readouterr().out
    assert min(size(tmp_path / "curves.png")) > 500


BAD = {
    "data": (["--data", "nowhere"], "--data: nowhere is not a folder"),
    "keep too large": (["--keep", "1.5"], "keep: got 1.5, expected"),
    "keep zero": (["--keep", "0"], "keep: got 0.0, expected"),
    "keep below the floors": (["--keep", "0.0001"], "keep: got 0.0001 of macs, expected at least"),
    "no number": (["--steps", "many"], "Invalid value for '--steps'"),
    "unknown option": (["--stepz", "3"], "--stepz"),
    "model": (["--model", "vgg"], "--model: got 'vgg', expected one of unet"),
    "select": (["--select", "best"], "--select: got 'best', expected names joined by"),
    "round to": (["--round-to", "x"], "--round-to: got 'x', expected"),
    "crop": (["--crop", "16"], "--crop: got 16, expected"),
    "threads": (["--threads", "-1"], "--threads: got -1, expected"),
    "dense and keep": (["--dense", "--keep", "0.3"], "--keep: got 0.3 with --dense"),
    "dense and shrink": (["--dense", "--shrink"], "--shrink: got it with --dense"),
    "resume": (["--resume", "nothing.pt"], "--resume: nothing.pt is not a file"),
    "backbone": (["--backbone", "nothing.pth"], "--backbone: nothing.pth is not a file"),
    "out": (["--out", "/dev/null/x"], "--out /dev/null/x cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(data, tmp_path, capsys, monkeypatch, case):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", str(data), *SMALL, "--out", str(tmp_path / "out")]
    assert run([*command, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    written = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert written == []


def test_masks_above_classes_are_refused(data, tmp_path, capsys):
    broken = write_data(tmp_path / "data")
    mask = Image.open(broken / "train" / "masks" / "0001.png")
    mask.point(lambda value: 3 * value).save(broken / "train" / "masks" / "0001.png")
    command = ["train", "--data", str(broken), *SMALL, "--out", str(tmp_path / "out")]
    assert run(command) == 2
    assert "0001.png has the value 3, but --classes is 2" in capsys.readouterr().err


def test_the_resume_file_of_another_network_is_refused(data, tmp_path, capsys):
    command = ["train", "--data", str(data), *SMALL, "--out", str(tmp_path), "--dense"]
    assert run([*command, "--stop-after", "2"]) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    resume = ["--resume", str(tmp_path / "checkpoint.pt"), "--width", "4"]
    assert run([*command, *resume]) == 2
    assert "is of a run with --width 3.0, this one has 4.0" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_info_names_everything_a_bug_report_needs(capsys):
    assert run(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("isa", "backend reference", "backend cpu", "torch", "cuda", "triton"):
        assert name in text
    assert torch.__version__ in text


def test_info_as_json_is_what_was_collected(capsys):
    assert run(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(_info.collect()))
    assert {backend["name"] for backend in found["backends"]} >= {"reference", "cpu"}
    if native.load() is not None:
        assert found["machine"]["isa"] == native.isa()


MAIN = "import sys; from sparsekern.__main__ import main; sys.exit(main())"
WITHOUT = "import sys; sys.modules[{!r}] = None; "


def test_python_m_sparsekern_is_the_command_line():
    process = subprocess.run(
        [sys.executable, "-m", "sparsekern", "train", "--model", "unet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: --data: got none, expected a folder or a CSV list")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "extra"), [("typer", "demo"), ("torchmetrics", "demo"), ("rich", "bench")]
)
def test_missing_extras_are_named_with_the_command_that_installs_them(tmp_path, module, extra):
    command = {"demo": ("demo", "--out", str(tmp_path)), "bench": ("bench", "--quick")}[extra]
    process = shell(WITHOUT.format(module) + MAIN, *command)
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: the sparsekern command needs {module}")
    assert process.stderr.endswith(f'pip install "sparsekern[{extra}]"\n')


def test_info_needs_no_extras():
    process = shell(WITHOUT.format("typer") + MAIN, "info")
    assert process.returncode == 0 and "backend reference" in process.stdout
