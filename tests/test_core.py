"""`info` and the benchmarks name a source tree without its compiled core."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from sparsekern import info as _info
from sparsekern.kernels import native as _native

ROOT = Path(__file__).parents[1]
WITHOUT = "import runpy, sys; sys.modules['sparsekern.kernels.native._C'] = None; "


def make_package(folder: Path, core: bool) -> Path:
    package = folder / "sparsekern"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if core:
        folder = package / "kernels" / "native"
        folder.mkdir(parents=True)
        (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    return package


def test_an_installed_package_that_a_tree_hides_is_found(tmp_path):
    tree, installed = make_package(tmp_path / "clone", False), make_package(tmp_path / "site", True)
    pure = make_package(tmp_path / "pure", False)
    paths = [str(tree.parent), str(pure.parent), str(installed.parent)]
    assert _info.shadowed(tree, paths) == installed
    assert _info.shadowed(tree, paths[:2]) is None
    assert _info.shadowed(installed, paths) is None


def test_info_says_that_it_is_hidden_and_the_way_out(tmp_path, monkeypatch):
    tree, installed = make_package(tmp_path / "clone", False), make_package(tmp_path / "site", True)
    monkeypatch.setattr(_info, "PACKAGE", tree)
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setattr(_native, "reason", "no native kernels")
    monkeypatch.setattr(sys, "path", [str(tree.parent), str(installed.parent), *sys.path])
    lines = dict(_info.lines(_info.collect()))
    assert lines["package"] == str(tree)
    assert str(installed) in lines["warning"] and "pip install -e ." in lines["warning"]
    monkeypatch.setattr(sys, "path", [str(tree.parent)])
    assert "warning" not in dict(_info.lines(_info.collect()))
    (tree.parent / "setup.py").touch()
    assert "source tree without its compiled core; compile it: pip" in str(_info.missing_core())


@pytest.mark.parametrize("name", ["steps", "exactness"])
def test_benchmarks_refuse_a_package_without_its_core_in_one_sentence(name):
    code = f"{WITHOUT} sys.argv = ['-m']; runpy.run_module('benchmarks.{name}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: benchmarks need the compiled core; sparsekern: got ")
    assert "python setup.py build_ext --inplace" in done.stderr and done.stderr.count("\n") == 1


def test_pytest_refuses_it_too():
    code = f"{WITHOUT} import pytest; sys.exit(pytest.main(['benchmarks', '--collect-only']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "benchmarks need the compiled core" in done.stdout + done.stderr
