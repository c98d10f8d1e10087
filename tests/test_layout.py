"""The map in CONTRIBUTING is true: every package is on it, imports go downwards only, and its files exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparsekern"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAP = re.search(r"```\n(files .*?)```", TEXT, re.DOTALL)
assert MAP is not None
ORDER = [line.split()[0] for line in MAP.group(1).splitlines()]
ROOMS = {
    line.split()[0]: re.findall(r"\w+", line.rpartition(":")[2])
    for line in MAP.group(1).splitlines()
    if "<" in line
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below ``sparsekern``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import, expected absolute ones"
            target = node.module or ""
            names = [f"{target}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            target, names = "", [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("sparsekern."):
                continue
            inner = name.removeprefix("sparsekern.")
            yield inner if inner in MODULES else target.removeprefix("sparsekern").removeprefix(".")


IMPORTS = {name: set(imported(path)) - {name, ""} for name, path in MODULES.items()}


def test_every_package_is_on_the_map() -> None:
    tops = {name.partition(".")[0] for name in MODULES} - {"", "__main__"}
    assert tops == set(ORDER)
    private = [path.name for path in PACKAGE.glob("_*.py") if not path.name.startswith("__")]
    assert len(private) <= 2, private


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_downwards(package: str) -> None:
    below = set(ORDER[: ORDER.index(package) + 1])
    for name, targets in IMPORTS.items():
        if name.partition(".")[0] == package:
            above = {target for target in targets if target.partition(".")[0] not in below}
            assert not above, f"{name} imports {sorted(above)}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_keep_their_order(package: str) -> None:
    rooms = ROOMS[package]
    for name, targets in IMPORTS.items():
        parts = name.split(".")
        if parts[0] != package or len(parts) < 3 or parts[1] not in rooms:
            continue
        below = rooms[: rooms.index(parts[1]) + 1]
        above = {
            t
            for t in targets
            if t.split(".")[0] == package and t.split(".")[1:2] and t.split(".")[1] in rooms
        }
        above = {target for target in above if target.split(".")[1] not in below}
        assert not above, f"{name} imports {sorted(above)}"


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in sorted(IMPORTS[name]):
            visit(target, (*path, name))
        done.add(name)

    for name in MODULES:
        if name:
            visit(name, ())


def test_files_that_the_map_names_exist() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|$", TEXT, re.MULTILINE)
    named = [file for row in rows for file in re.findall(r"`([\w/.]+\.\w+)`", row)]
    assert len(named) >= 10
    for file in named:
        assert (ROOT / file).is_file() or (PACKAGE / file).is_file(), file


def test_every_folder_is_a_package() -> None:
    """Tools that read sources, such as those of the site, find no module in a folder that is none."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
