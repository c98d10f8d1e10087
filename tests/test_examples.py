"""Every example runs unchanged; the examples of one process then continue from the files that they wrote."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekern.recipes._torchvision  # has to come before the trainers, which import torchvision

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULT = re.compile(r"accuracy (\d\.\d+) with ([\d,]+) parameters")

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def parameters(output: str) -> int:
    """The number of parameters of the compact network, whose accuracy must exceed that of guessing."""
    found = RESULT.findall(output)
    assert len(found) == 1, output
    accuracy, count = found[0]
    assert float(accuracy) > 2 / 8
    return int(count.replace(",", ""))


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("plain_loop", ["--steps", "50"]),
        ("lightning_trainer", ["--epochs", "2"]),
        ("hugging_face", ["--epochs", "2"]),
    ],
)
def test_in_one_process(
    name: str,
    length: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, *length, "--folder", str(tmp_path)])
    counts = []
    for _ in range(2):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        counts.append(parameters(capfd.readouterr().out))
    # The second run starts from the last checkpoint of the first, at its end.
    assert counts[0] == counts[1] < 60_000
    assert (tmp_path / f"{name}.safetensors").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_in_two_processes(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / f"{name}.py"), "--steps", "50", "--batch", "16", "--folder", str(tmp_path)]
    # The package under test, wherever it is imported from here.
    path = Path(sparsekern.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert parameters(done.stdout) < 60_000
    assert (tmp_path / f"{name}.safetensors").exists()
