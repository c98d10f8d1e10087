from __future__ import annotations

from dataclasses import replace

import pytest
from method.test_tables import line
from typer.testing import CliRunner

from benchmarks.method import tables
from benchmarks.method.__main__ import app
from benchmarks.method.figure import draw, figure_of
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
    assert not (tmp_path / "some.png").exists()  # one budget makes no curve


def test_the_picture_shows_the_differences_to_dense_at_every_budget(tmp_path):
    records = [line("dense", name, 0, 0.75) for name in ("vessels", "scenes")]
    records += [
        line(arm, name, 0, 0.75 + gain) | {"keep": keep}
        for arm, gains in (("default", (-0.03, 0.01)), ("narrow", (-0.2, -0.1)))
        for keep, gain in zip((0.1, 0.5), gains, strict=True)
        for name in ("vessels", "scenes")
    ]
    figure = figure_of(tables.unets(records))
    panels = figure.get_axes()
    assert [panel.get_title() for panel in panels] == ["vessels", "scenes", "mean of the sets"]
    for panel in panels:
        bars = {bar.get_label(): bar.lines[0].get_ydata() for bar in panel.containers}
        assert list(bars["default"]) == pytest.approx([-0.03, 0.01])
        assert list(bars["narrow"]) == pytest.approx([-0.2, -0.1])
    draw(tables.unets(records), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


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
