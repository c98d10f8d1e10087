"""Looking at a network: tables, pictures and the command."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from prune.networks import Plain, Residual, batch
from rich.console import Console

import sparsekern
from sparsekern.cli import run
from sparsekern.graph import trace
from sparsekern.report import picture, tables
from sparsekern.report.inspect import find_model, make_input, plan_by_weights

SVG = "{http://www.w3.org/2000/svg}"


def printed(table: object) -> str:
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue()


def test_sensitivities_are_shares_of_the_whole() -> None:
    graph = trace(Plain(), batch(0))
    saliency = np.ones(graph.num_channels)
    stem = graph.groups[0].channels
    saliency[stem[:12]] = 0.0
    rows = tables.sensitivities(graph, saliency)
    assert [row.name for row in rows] == [group.name for group in graph.groups]
    assert rows[0].lost == {0.25: 0.0, 0.5: 0.0, 0.75: 0.0}
    assert rows[1].lost == {0.25: 0.25, 0.5: 0.5, 0.75: 0.75}
    # stem.0: 27 weights, two of the norm and nine times 32 of the next layer for each of 16 channels.
    whole = graph.cost(np.ones(graph.num_channels, bool))
    assert rows[0].params == pytest.approx(16 * (27 + 2 + 9 * 32) / whole.params)
    assert rows[0].macs == pytest.approx(4 * 64 * 16 * (27 + 9 * 32) / whole.macs)
    text = printed(tables.sensitivity_table(rows, "magnitude"))
    assert "stem.0" in text and "75.0%" in text


def test_the_table_of_what_is_kept_has_bars_and_totals() -> None:
    graph = trace(Plain(), batch(0))
    kept = np.ones(graph.num_channels, bool)
    kept[graph.groups[0].channels[4:]] = False
    text = printed(tables.kept_table(graph, kept))
    (line,) = (line for line in text.splitlines() if "stem.0" in line)
    assert line.count("█") == 6 and line.count("░") == 18
    assert f"{graph.cost(kept).macs / graph.cost(np.ones_like(kept)).macs:.1%}" in text


def test_edges_follow_the_weights() -> None:
    graph = trace(Residual(), batch(0))
    names = [*(group.name for group in graph.groups), "rest"]
    found = {(names[a], names[b]) for a, b in picture.edges(graph)}
    assert found == {
        ("stem.0", "stem.0"),
        ("stem.0", "right.0"),
        ("right.0", "stem.0"),
        ("stem.0", "rest"),
    }


def test_the_svg_is_well_formed_and_shows_every_group(tmp_path: Path) -> None:
    graph = trace(Plain(), batch(0))
    kept = np.ones(graph.num_channels, bool)
    kept[graph.groups[1].channels[7:]] = False
    page = picture.draw(graph, kept)
    picture.write_svg(page, tmp_path / "groups.svg")
    root = ElementTree.parse(tmp_path / "groups.svg").getroot()
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert root.tag == f"{SVG}svg"
    assert {"stem.0", "body.0", "bare", "7 of 32", "16"} <= set(texts)
    assert len(list(root.iter(f"{SVG}path"))) == len(picture.edges(graph)) == 3
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("x", 0)) >= 0 and float(box.get("y", 0)) >= 0
        assert float(box.get("x", 0)) + float(box.get("width", 0)) <= page.width


def test_names_that_xml_reserves_are_escaped(tmp_path: Path) -> None:
    page = picture.Drawing(100, 50, labels=[picture.Label(0, 10, "a<b & c>")])
    picture.write_svg(page, tmp_path / "x.svg")
    (text,) = ElementTree.parse(tmp_path / "x.svg").getroot().iter(f"{SVG}text")
    assert text.text == "a<b & c>"


def test_svg_needs_no_matplotlib(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from torch import nn, randn\n"
        "import sparsekern\n"
        "from sparsekern.report import picture\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))\n"
        "picture.write_svg(picture.draw(sparsekern.trace(net, randn(1, 3, 8, 8))), Path('x.svg'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsekern.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.svg").exists()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory with factories, good and bad."""
    (tmp_path / "inspected.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width=8):\n"
        "        super().__init__(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3))\n"
        "class Zoo:\n"
        "    make = staticmethod(lambda: Net(12))\n"
        "ready = Net(4)\n"
        "number = 3\n"
        "def words():\n"
        "    return 'network'\n"
        "def broken():\n"
        "    raise OSError('no weights')\n"
    )
    (tmp_path / "faulty.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "inspected", raising=False)
    return "inspected"


@pytest.mark.parametrize(("name", "width"), [("Net", 8), ("Zoo.make", 12), ("ready", 4)])
def test_a_network_is_found_by_its_name(module: str, name: str, width: int) -> None:
    assert find_model(f"{module}:{name}")[0].out_channels == width


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("inspected", "^target: got 'inspected', expected module:factory"),
        (":Net", "^target: got ':Net'"),
        (
            "nowhere:Net",
            "^target: got 'nowhere:Net', whose module 'nowhere' cannot be imported, .*: ModuleNotFoundError",
        ),
        (
            "faulty:Net",
            "^target: got 'faulty:Net', whose module 'faulty' cannot be imported, .*nothing_of_that_name",
        ),
        ("inspected:Nothing", "^target: got 'inspected:Nothing', but 'inspected' has no 'Nothing'"),
        (
            "inspected:words",
            "^target: got 'inspected:words', which returns a str, expected a torch.nn.Module",
        ),
        (
            "inspected:broken",
            "^target: got 'inspected:broken', which fails without arguments, .*: OSError: no weights",
        ),
        ("inspected:number", "^target: got 'inspected:number', which fails without arguments, .*: TypeError"),
    ],
)
def test_what_is_no_network_is_named(module: str, target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_model(target)


def test_inputs_from_text() -> None:
    image, words = make_input("1, 3,8,8"), make_input("2,5:int64")
    assert image.shape == (1, 3, 8, 8) and image.dtype == torch.float32 and image.std() > 0.5
    assert torch.equal(words, torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(make_input("4"), make_input("4"))
    for bad in ("", "1x3", "1,3,", "1,3:nn", "-1,3"):
        with pytest.raises(ValueError, match=r"^--input: got .*, expected sizes such as 1,3,224,224"):
            make_input(bad)


def test_a_plan_by_weights_is_that_of_prune_once() -> None:
    torch.manual_seed(0)
    model = Plain()
    graph, kept = plan_by_weights(model, (batch(0),), keep=0.4)
    network, _ = sparsekern.prune_once(model, batch(0), keep=0.4, select=sparsekern.criteria.Magnitude())
    assert network.stem[0].out_channels == kept[graph.groups[0].channels].sum()


def test_the_command_shows_everything(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", f"{module}:Net", "--input", "1,3,16,16", "--keep", "0.5"]
    assert run([*command, "--svg", str(tmp_path / "a.svg"), "--png", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out
    for part in (
        "8 channels in 1 groups",
        "not pruned because",
        "What groups cost",
        "Kept at 50% of macs",
        "█",
    ):
        assert part in text
    ElementTree.parse(tmp_path / "a.svg")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 100
        assert np.asarray(image.convert("RGB")).std() > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspected:Net", "--input", "1,5,16,16"], "example_inputs: "),
        (["inspected:Net", "--input", "1,3,16,16", "--keep", "2"], "keep: got 2.0"),
        (["inspected:Net", "--input", "1,3,16,16", "--keep", "0.5", "--of", "size"], "of: got 'size'"),
        (["inspected:Net", "--input", "1,3,16,16", "--svg", "nowhere/x.svg"], "its directory does not exist"),
        (["inspected:Net", "--input", "wide"], "--input: got 'wide'"),
        (["inspected:Net"], "--input"),
        (
            ["nowhere:Net", "--input", "1,3,16,16"],
            "target: got 'nowhere:Net', whose module 'nowhere' cannot be imported",
        ),
    ],
)
def test_bad_input_is_one_line(
    module: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_network_without_prunable_channels_is_shown_too(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fixed.py").write_text(
        "from torch import nn\nmake = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1))\n"
    )
    assert run(["inspect", "fixed:make", "--input", "1,3,8,8", "--svg", str(tmp_path / "f.svg")]) == 0
    assert "0 channels in 0 groups" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "f.svg")
