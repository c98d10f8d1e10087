from __future__ import annotations

from dataclasses import replace

import pytest
from method.test_tables import line
from typer.testing import CliRunner

from benchmarks.method.__main__ import app
from benchmarks.method.lines import append
from benchmarks.method.runs import Run
from benchmarks.method.sets import UNET


def test_the_report_lies_beside_the_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    for arm, dice in (("dense", 0.75), ("default", 0.7)):
        run = Run("unet", 0.1, 0, arm, "vessels")
        key = run.key(replace(UNET, lr=run.rate()))
        append(path, line(arm, "vessels", 0, dice) | key)
    found = CliRunner().invoke(app, ["--report", "--results", str(path)])
    assert found.exit_code == 0, found.output
    assert "| dense | -0.0500 (1 seed) |" in (tmp_path / "some.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "cats"], "--sets: got 'cats', expected some of vessels, membranes, scenes"),
        (["--arms", "dense,wide"], "--arms: got 'wide', expected some of dense, narrow"),
        (["--report"], "results: got no complete line"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, arguments, message):
    found = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path / "none.jsonl")])
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_limit_of_none_trains_nothing(tmp_path):
    found = CliRunner().invoke(app, ["--limit", "0", "--results", str(tmp_path / "none.jsonl")])
    assert found.exit_code == 0 and not list(tmp_path.iterdir())
