from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.small import case
from bench.test_wrong import broken, spoil_last_bit
from PIL import Image

import sparsekern
from sparsekern import cli
from sparsekern.bench import cases, command, compare
from sparsekern.kernels.backends import cpu


@pytest.fixture
def table(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace all cases by three, one of which is not quick, and the timer by a stub."""
    few = (
        case("adam_step_", quick=True),
        case("sgd-step", tensors="few"),
        case("adam_step_", backend="cuda"),
    )

    def select(pattern: str = "", *, quick: bool = False) -> list[cases.Case]:
        return cases.select(pattern, quick=quick, cases=few)

    monkeypatch.setattr(command, "select", select)
    right = command.Suite
    monkeypatch.setattr(command, "Suite", lambda *counts: right(*counts, shortest=0.0, elements=1000))


def bench(*arguments: str) -> int:
    return cli.run(["bench", "--rounds", "2", *arguments])


def test_table_json_and_plot(table: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "now.json", tmp_path / "roofline.png"
    assert bench("--json", str(file), "--plot", str(picture), "--threads", "1") == 0
    text = capsys.readouterr().out
    for part in (
        "adam_step_/cpu/float32/small/0%",
        "torch foreach 0.",
        "of stream",
        "stream on the cpu",
        "threads 1",
    ):
        assert part in text
    assert "backend cuda does not work here" in text and "1 cases left out" in text
    with Image.open(picture) as image:
        assert min(image.size) > 500
    report = json.loads(file.read_text())
    where = report["environment"]
    assert set(where) >= {"machine", "isa", "threads", "torch", "sparsekern", "commit", "freed_memory"}
    assert where["threads"] == 1
    assert [found["status"] for found in report["cases"]] == ["timed", "timed", "absent"]
    assert (report["placements"], report["rounds"]) == (4, 2) and report["seconds"] > 0
    first = report["cases"][0]
    assert (first["op"], first["backend"], first["dtype"]) == ("adam_step_", "cpu", "float32")
    assert first["share_of_stream"]["q1"] <= first["share_of_stream"]["q3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["now.json", "roofline.png"]


def test_json_alone_on_standard_output(table: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", "--json", "-") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [found["name"] for found in report["cases"]] == ["adam_step_/cpu/float32/small/0%"]
    assert "torch fused" in captured.err


def test_compare_and_fail_above(table: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.json"
    assert bench("--filter", "adam.*cpu", "--json", str(file)) == 0
    old = json.loads(file.read_text())
    for found in old["cases"]:
        for figures in found["over"].values():
            figures.update({key: value / 100 for key, value in figures.items()})
    old["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(old))
    capsys.readouterr()
    assert bench("--compare", str(file)) == 0
    text = capsys.readouterr().out
    assert "REGRESSED" in text and "not measured alike: torch 1.0, now" in text
    assert text.count("adam_step_/cpu") == 2 and text.count("sgd-step") == 1
    assert bench("--compare", str(file), "--fail-above", "2") == 1
    assert bench("--compare", str(file), "--fail-above", "1e6") == 0
    assert compare.read(file) == old


def test_a_wrong_result_is_the_exit_code(
    table: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cpu, "step_", broken("adam_step_", spoil_last_bit, calls))
    file = tmp_path / "now.json"
    assert bench("--json", str(file)) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text and "WRONG, not timed: adam_step_/cpu/float32/small/0%: parameter 9" in text
    first = json.loads(file.read_text())["cases"][0]
    assert first["status"] == "wrong" and first["seconds"] == {} and "parameter 9" in first["reason"]
    assert calls == ["adam_step_"]


BAD = {
    "filter": (["--filter", "nothing"], "--filter: got 'nothing', expected a part of the name of a case"),
    "pattern": (["--filter", "("], "--filter: got '(', expected a regular expression"),
    "rounds": (["--rounds", "0"], "--rounds: got 0, expected 1 or more"),
    "threads": (["--threads", "-1"], "--threads: got -1, expected"),
    "json": (["--json", "no/where.json"], "--json: got no/where.json, expected a file name in a directory"),
    "json is a directory": (["--json", "."], "--json: got ., expected a file name"),
    "plot": (["--plot", "no/where.png"], "--plot: got no/where.png, expected a file name in a directory"),
    "picture": (["--plot", "roofline.txt"], "--plot: got roofline.txt, expected a name that ends in"),
    "compare": (["--compare", "nothing.json"], "--compare: cannot read nothing.json"),
    "alone": (["--fail-above", "1.1"], "--fail-above: got 1.1 without --compare"),
    "too small": (["--fail-above", "0.5", "--compare", "x"], "--fail-above: got 0.5, expected a number of 1"),
    "no number": (["--fail-above", "nan", "--compare", "x"], "--fail-above: got nan, expected a number of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_is_measured(
    table: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(command, "_run", measured)
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def python(*arguments: str, cwd: Path, path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_alone_can_do_it(tmp_path: Path) -> None:
    """The installed package works without working tree, pytest and ``benchmarks``."""
    source = Path(sparsekern.__file__).parent
    shutil.copytree(source, tmp_path / "sparsekern", ignore=shutil.ignore_patterns("__pycache__"))
    arguments = ("--filter", "adamw-step.*tiny", "--rounds", "1", "--threads", "1", "--json", "-")
    report = json.loads(python("-m", "sparsekern", "bench", *arguments, cwd=tmp_path, path=tmp_path))
    assert {found["status"] for found in report["cases"] if found["backend"] == "cpu"} == {"timed"}
    assert report["environment"]["commit"] == "unknown"


FAULTS = """
import resource, sys, torch
import sparsekern.cli
assert not any(name.startswith("sparsekern.bench") for name in sys.modules)
from sparsekern.bench.environment import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# Now and then a small block gets into the way of the next large one, so the best of some counts.
before = min(faults() for _ in range(5))
with kept_memory() as memory:
    print(memory, before, min(faults() for _ in range(5)))
"""


def test_freed_memory_is_kept_and_nothing_else_imports_the_suite(tmp_path: Path) -> None:
    root = Path(sparsekern.__file__).parents[1]
    memory, before, kept = python("-c", FAULTS, cwd=tmp_path, path=root).split()
    if memory == "kept":
        assert int(before) > 8000 and int(kept) < 1000
