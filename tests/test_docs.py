"""What the documentation says about the tree is true: places in the code, files, links, messages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
TERMS = [line for line in GLOSSARY.splitlines() if re.match(r"\| (?!term |word )\w", line)]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("line", TERMS, ids=[line.split("|")[1].strip() for line in TERMS])
def test_a_term_of_the_glossary_is_in_the_code(line: str) -> None:
    named = re.findall(r"`(\w+)` in `([\w/.]+)`", line.split("|")[3])
    assert named, line
    for name, path in named:
        file = ROOT / ("" if path.startswith("csrc/") else "sparsekern") / path
        assert file.is_file(), path
        assert re.search(rf"\b{name}\b", file.read_text()), f"{path} has no {name}"


def test_the_table_of_csrc_names_every_file() -> None:
    """By its name, or by its stem for a header with its source file; and every name is that of a file."""
    table = (ROOT / "csrc" / "README.md").read_text().partition("## Files")[2]
    named = {
        Path(name).name
        for cell in re.findall(r"^\| (.*?) \|", table, re.M)
        for name in re.findall(r"`(.+?)`", cell)
    }
    files = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}
    ]
    assert [str(path.relative_to(ROOT)) for path in files if not {path.name, path.stem} & named] == []
    assert named <= {path.name for path in files} | {path.stem for path in files}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)?(?:#[\w-]*)?\)", text):
        assert not target or (page.parent / target).exists(), f"{page.name} links to {target}"


def texts_of_the_source() -> str:
    """Every string constant of the package; parts of f-strings are apart from each other."""
    found = []
    for path in (ROOT / "sparsekern").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_troubleshooting_lists_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^\*\*(.+?)\*\*", page, re.M)))
    assert len(messages) >= 25
    source = texts_of_the_source() + (ROOT / "csrc" / "cpu" / "dispatch.cpp").read_text()
    for message in messages:
        for part in message.split("..."):
            assert part.strip(" ,;:'") in source, f"{message}: no message with {part!r}"


# The arms of the study by the names that pages give them.
ARMS = {
    "dense": "dense",
    "dense, nothing pruned": "dense",
    "do not prune": "dense",
    "default": "default",
    "the default": "default",
    "default, `allocate=Global(balance=0.75)`": "balance",
    "default, counting at the activations": "activation",
    "`Taylor` alone": "taylor",
    "`Taylor()` alone": "taylor",
    "rank by `Taylor` alone": "taylor",
    "`GradientCount` alone": "count",
    "`GradientCount()` alone": "count",
    "`Magnitude` alone": "magnitude",
    "`Magnitude()` alone": "magnitude",
    "rank by the norm of the filters": "magnitude",
    "random channels, uniform widths": "random",
    "remove random channels, uniform widths": "random",
    "`Random()` with `Uniform()`": "random",
    "choose the same number of channels at random in each layer": "shuffled",
    "default widths, new weights": "fresh",
    "train the default's widths from scratch": "fresh",
    "`Redundancy` alone": "redundancy",
    "`Redundancy()` alone": "redundancy",
    "default with `Global(balance=0.75)`": "balance",
    "default, uniform widths": "uniform",
    "default, `allocate=Uniform()`": "uniform",
    "random channels, the default's widths": "shuffled",
    "all layers equally wide, from scratch, equal MACs": "flat",
    "train a UNet with equally wide layers from scratch, equal MACs": "flat",
    "do not prune, train as long as pruning takes": "dense-time",
    "narrow from scratch, equal MACs": "narrow",
    "train a narrow UNet from scratch, equal MACs": "narrow",
}


MAIN = "keep=0.1 of the MACs"


@pytest.mark.parametrize("name", ["benchmarks", "comparison", "settings"])
def test_numbers_of_the_study_are_those_of_its_results(name: str) -> None:
    results = (ROOT / "benchmarks" / "results" / "method.md").read_text()
    table = results.partition(MAIN)[2].partition("| default minus")[0]
    measured = dict(re.findall(r"^\| ([\w-]+) \|.* ([\d.]+) \|$", table, re.MULTILINE))
    page = (ROOT / "docs" / f"{name}.md").read_text()
    checked = 0
    for rows in re.findall(r"^\| [^|]+ \| Dice \|\n\|[- |]+\n((?:\|.*\n)+)", page, re.M):
        for label, number in re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", rows, re.M):
            assert f"{float(measured[ARMS[label]]):.3f}" == number, f"{label}: got {number}"
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize(
    ("head", "section", "least"),
    [("bootstrap intervals over seeds:", MAIN, 8), ("With 20 % of the MACs", "keep=0.2 of the MACs", 6)],
)
def test_differences_of_the_study_are_those_of_its_results(head: str, section: str, least: int) -> None:
    results = (ROOT / "benchmarks" / "results" / "method.md").read_text().partition(section)[2]
    measured = _rows(results.partition("| default minus")[2])
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    shown = _rows(page.partition(head)[2])
    assert len(shown) >= least
    for label, numbers in shown.items():
        exact = [f"{float(number):+.3f}" for number in measured[ARMS[label]]]
        assert exact == numbers, label


def _rows(text: str) -> dict[str, list[str]]:
    """The numbers with a sign in each row of the first table of a text, by the first column."""
    table = text[text.index("\n| --- |") :].partition("\n\n")[0]
    lines = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    return {name.strip(): re.findall(r"[-+]\d\.\d+", "".join(cells)) for name, *cells in lines}
