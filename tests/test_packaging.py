"""The published package: files and metadata of the sdist, made by the build itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import sparsekern

ROOT = Path(__file__).parents[1]
ADDRESS = "https://code.example/owner/sparsekern"


def make_sdist(folder: Path, **environment: str) -> dict[str, bytes]:
    """The files of an sdist by their paths in it."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    done = subprocess.run(
        [*command, "sdist", "--dist-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "SPARSEKERN_NO_NATIVE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {
            member.name.partition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in members
        }


def headers(files: dict[str, bytes]) -> Message:
    return HeaderParser().parsestr(files["PKG-INFO"].decode())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_sdist(tmp_path_factory.mktemp("sdist"), SPARSEKERN_REPOSITORY=ADDRESS + "/")


def test_the_sdist_holds_what_is_compiled_and_what_its_readme_installs_with(files):
    kinds = (".h", ".cpp", ".cu", ".cuh")
    compiled = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in kinds}
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "sparsekern").rglob("*.py")}
    others = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt", "sparsekern/py.typed"}
    assert len(compiled) > 50
    assert compiled | python | others <= files.keys()
    assert not [name for name in files if name.endswith((".so", ".pyc"))]
    for name in compiled:
        assert files[name] == (ROOT / name).read_bytes(), name


def test_there_is_one_version(files):
    assert headers(files)["Version"] == sparsekern.__version__


def test_metadata_say_who_where_and_on_what(files):
    found = headers(files)
    assert found["Author"]
    assert f"Repository, {ADDRESS}" in found.get_all("Project-URL")
    classifiers = found.get_all("Classifier")
    assert any(text.startswith("Operating System :: ") for text in classifiers)
    assert any(re.fullmatch(r"Programming Language :: Python :: 3\.\d+", text) for text in classifiers)
    assert "onnx" in found.get_all("Provides-Extra")


def test_links_of_the_description_lead_out_of_the_package(files):
    text = headers(files).get_payload()
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text)
    assert any(is_image for is_image, _ in links) and any(not is_image for is_image, _ in links)
    for is_image, link in links:
        kind = "raw" if is_image else "blob"
        assert link.startswith(f"{ADDRESS}/{kind}/HEAD/"), link
        assert (ROOT / link.split("/HEAD/")[1]).exists(), link


def test_without_an_address_none_is_made_up(tmp_path):
    files = make_sdist(tmp_path, SPARSEKERN_REPOSITORY="")
    assert headers(files).get_all("Project-URL") is None
    assert headers(files).get_payload().strip() == (ROOT / "README.md").read_text().strip()
