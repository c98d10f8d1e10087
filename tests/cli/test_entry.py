"""The command line without a command, and its messages where libraries are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekern
from sparsekern.cli import run

MAIN = "import sys; from sparsekern.__main__ import main; sys.exit(main())"


def test_without_a_command_the_help_is_printed_as_it_is(capsys):
    assert run([]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and lines[0].startswith("Usage: sparsekern")
    commands = {line.split()[0] for line in lines if line.startswith("  ")}
    assert commands >= {"train", "demo", "predict", "evaluate", "export", "inspect", "bench", "info"}


def test_the_version_is_that_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"sparsekern {sparsekern.__version__}\n"


def test_brackets_in_paths_are_printed(tmp_path, capsys):
    command = ["predict", str(tmp_path / "[bold].safetensors"), str(Path(__file__)), "--out", str(tmp_path)]
    assert run(command) == 2
    assert "[bold].safetensors" in capsys.readouterr().err


def without(modules: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {MAIN}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_bench_and_info_do_without_what_training_needs():
    modules = ["PIL", "torchmetrics"]
    assert "backend reference" in without(modules, "info").stdout
    done = without(modules, "bench", "--filter", "no such case")
    assert "needs" not in done.stderr, done.stderr


def test_export_names_its_extra(trained, tmp_path):
    done = without(["onnx"], "export", str(trained), str(tmp_path / "x.onnx"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'needs onnx, which is not installed; run: pip install "sparsekern[onnx]"' in done.stderr


# Packages that fail like ones built for another torch: always, or because a schema is missing.
BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
REPAIRABLE = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *a: a[0])\n"
MESSAGE = "torchvision: got 0.1.2 beside torch"


def with_torchvision(
    folder: Path, content: str, code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(content)
    (folder / "torchvision-0.1.2.dist-info").mkdir()
    (folder / "torchvision-0.1.2.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1.2\n")
    (folder / "uses_torchvision.py").write_text("import torch, torchvision\nnet = torch.nn.Linear(3, 2)\n")
    package = Path(sparsekern.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{package}"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)


FIND = "from sparsekern.report.inspect import find_model; find_model('uses_torchvision:net'); print('found')"
ENTRANCES = {
    "inspect": FIND,
    "lightning": "import sparsekern.integrations.lightning; print('found')",
    "command": MAIN,
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_torchvision_that_does_not_fit_is_named_with_the_way_out(entrance, tmp_path):
    arguments = ["train", "--data", "x"] if entrance == "command" else []
    done = with_torchvision(tmp_path, BROKEN, ENTRANCES[entrance], *arguments)
    assert done.returncode == (2 if entrance == "command" else 1) and "found" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert MESSAGE in last and "install both in one command from the same index" in last, done.stderr


def test_one_that_lacks_its_operators_alone_is_used_with_a_warning(tmp_path):
    done = with_torchvision(tmp_path, REPAIRABLE, FIND)
    assert "found" in done.stdout, done.stderr
    assert MESSAGE in done.stderr and "UserWarning" in done.stderr


def test_other_errors_of_an_import_stay_what_they_are(tmp_path):
    done = with_torchvision(tmp_path, "", FIND.replace("uses_torchvision:net", "nowhere:net"))
    assert (
        "module 'nowhere' cannot be imported" in done.stderr
        and "torchvision" not in done.stderr.splitlines()[-1]
    )
