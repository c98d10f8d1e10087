"""The documentation site: public names and pages have places, links are checked, facts hold."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_programs import DOCS, load

import sparsekern

if importlib.util.find_spec("tomllib"):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^::: ([\w.]+)(?:\n    options:\n      heading: ([\w.]+))?$", re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.filterwarnings("ignore:.*")


build = load("build")


def public_names() -> dict[str, list[str]]:
    """``__all__`` of each module that says what it offers: of those with a ``__dir__`` of their own."""
    found = {}
    for path in sorted((ROOT / "sparsekern").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "__dir__" for node in body):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            assigned = [node for node in body if isinstance(node, ast.Assign)]
            (names,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__"]
            found[name] = ast.literal_eval(names)
    return found


def at(path: str) -> Any:
    """The object at a dotted path; modules come first: a package may have a function of their name."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise AssertionError(path)


def documented() -> list[tuple[str, str]]:
    """(path, public name) of every object on the reference pages."""
    texts = [page.read_text() for page in sorted((DOCS / "reference").glob("*.md"))]
    return [(path, heading or path) for text in texts for path, heading in DIRECTIVE.findall(text)]


# Names of these modules are documented under their full names. Importing them takes seconds.
TRAINERS = "sparsekern.integrations."


def test_the_reference_documents_every_public_name() -> None:
    modules = public_names()
    assert len(modules) >= 10 and {"sparsekern", "sparsekern.graph", TRAINERS + "lightning"} <= modules.keys()
    names = {name for _, name in documented()}
    shown = {id(at(path)) for path, _ in documented() if not path.startswith(TRAINERS)}
    missing = []
    for module, attributes in modules.items():
        for attribute in attributes:
            name = f"{module}.{attribute}"
            if name in names:
                continue
            value = None if name.startswith(TRAINERS) else getattr(importlib.import_module(module), attribute)
            if not inspect.ismodule(value) and id(value) not in shown:
                missing.append(name)
    assert missing == [], "docs/reference: got no line of three colons and the name for these"


def test_names_on_the_reference_pages_are_those_that_users_write() -> None:
    pairs = documented()
    assert len(pairs) == len({name for _, name in pairs})
    for path, name in pairs:
        if path.startswith(TRAINERS):
            continue
        # As an attribute, and as an import: `sparsekern.compact` is a function, and a package for import.
        attribute: Any = sparsekern
        for part in name.split(".")[1:]:
            attribute = getattr(attribute, part, None)
            assert not part.startswith("_") or part == "__version__", name
        assert at(path) in (attribute, at(name)), name


def nav_entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else (entry,):
            if isinstance(value, list):
                yield from nav_entries(value)
            else:
                yield value


def test_every_page_is_in_the_navigation_once() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    entries = list(nav_entries(nav))
    pages = {
        place for source, place in build.places().items() if place.endswith(".md") and "results" not in source
    }
    assert sorted(entries) == sorted(pages)


HELD = {
    "docs/index.md": "index.md",
    "docs/guide/own-loop.md": "guide/own-loop.md",
    "docs/settings.md": "settings.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/faults.txt": "results/faults.txt",
}


@pytest.mark.parametrize(
    ("source", "text", "result"),
    [
        ("docs/guide/own-loop.md", "[a](../settings.md#keep)", "[a](../settings.md#keep)"),
        ("docs/guide/own-loop.md", "[a](../../benchmarks/results/faults.txt)", "[a](../results/faults.txt)"),
        ("docs/index.md", "[`a`](../CONTRIBUTING.md#habits)", "[`a`](contributing.md#habits)"),
        ("CONTRIBUTING.md", "[a](docs/settings.md) ![b](docs/index.md)", "[a](settings.md) ![b](index.md)"),
        (
            "docs/index.md",
            "[a](https://x.org/docs/settings.md) [b](#c)",
            "[a](https://x.org/docs/settings.md) [b](#c)",
        ),
        ("docs/index.md", "see [the tests](../tests) or", "see the tests or"),
        ("docs/index.md", "```\n[a](../tests)\n```\n[a](../tests)", "```\n[a](../tests)\n```\na"),
    ],
)
def test_links_lead_to_places_on_the_site(source: str, text: str, result: str) -> None:
    assert build.with_site_links(text, source, HELD) == result


def test_links_to_other_files_lead_to_the_repository() -> None:
    text = build.with_site_links("[a](../tests)", "docs/index.md", HELD, "https://code.example/o/n")
    assert text == "[a](https://code.example/o/n/blob/HEAD/tests)"


def test_broken_links_of_a_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a b.txt").write_text("")
    good = (
        '<p id="here"><a href="#here">1</a> <a href="sub/#there">2</a> <a href="https://x.org/nothing">3</a>'
    )
    good += '<a href="a%20b.txt">4</a> <img src="data:,"> <a href="/sub/">5</a> <a href="?q">6</a>'
    (tmp_path / "index.html").write_text(good)
    (tmp_path / "sub" / "index.html").write_text('<p id="there"><a href="..">up</a>')
    assert list(build.broken_links(tmp_path)) == []
    (tmp_path / "sub" / "index.html").write_text(
        '<a href="../none/">1</a><img src="x.png"><a href="#gone">2</a>'
    )
    lines = list(build.broken_links(tmp_path))
    assert [line.partition(": ")[2].partition(" leads")[0] for line in lines] == [
        "sub/#there",
        "../none/",
        "x.png",
        "#gone",
    ]


def test_faults_of_the_reference_are_found(tmp_path: Path) -> None:
    for name, text in {
        "good": '<div class="doc-function">a class: b</div>',
        "bad": '<div class="doc doc-module">see :class:<code>x</code></div>',
    }.items():
        (tmp_path / "reference" / name).mkdir(parents=True)
        (tmp_path / "reference" / name / "index.html").write_text(text)
    found = list(build.reference_faults(tmp_path))
    assert len(found) == 2 and all(line.startswith("reference/bad/index.html: got ") for line in found)


def test_the_support_table_says_what_the_project_requires_and_ci_runs() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", (DOCS / "support.md").read_text(), re.MULTILINE))
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    least = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"]))
    assert pinned is not None and least is not None
    tested, expected, _ = rows["torch"].split(" | ")
    assert tested == pinned[1] and expected.startswith(least[1])
    versions = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)}
    assert versions == set(re.findall(r"3\.\d+", rows["Python"].rpartition(" | ")[0]))
    assert PROJECT["requires-python"] == ">=3.10" and "3.9" in rows["Python"].rpartition(" | ")[2]


def test_the_citation_is_of_this_version() -> None:
    fields = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert fields["version"] == sparsekern.__version__
    assert fields["license"] == PROJECT["license"]
    assert "cff-version" in fields and PROJECT["name"] in fields["title"]
