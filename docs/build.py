"""Build the documentation site into build/site: ``pip install -e ".[docs]"``, then ``python docs/build.py``.

Pages link to files of the repository, so that they can also be read there. The site holds the files of
PLACES. This program copies them to build/docs, points their links to the places on the site, runs Zensical in
strict mode, and follows every link of the result to its file and anchor. No link to another host is opened.
Notebooks become pages with their stored outputs and pictures. docs/execute.py executes them.

Environment:
    SPARSEKERN_REPOSITORY=https://HOST/OWNER/NAME: the public repository. Links to files that the site does
        not hold lead there; without an address their text stays.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
STAGED = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"

# Files and folders of the repository, and their places on the site.
PLACES = {
    "docs": "",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "LICENSE.txt",
    "csrc/README.md": "native.md",
    "benchmarks/results": "results",
    "examples": "examples",
}
FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def places(root: Path = ROOT) -> dict[str, str]:
    """The path on the site of every file that the site holds, by its path in the repository."""
    found = {}
    for source, place in PLACES.items():
        path = root / source
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        for file in files:
            inner = "" if file == path else file.relative_to(path).as_posix()
            if file.suffix in {".pyc"} or (source == "docs" and file.suffix == ".py"):
                continue
            on_site = "/".join(part for part in (place, inner) if part)
            if file.suffix == ".ipynb":
                on_site = on_site.removesuffix(".ipynb") + ".md"
            found[file.relative_to(root).as_posix()] = on_site
    return found


def with_site_links(text: str, source: str, held: dict[str, str], repository: str = "") -> str:
    """The text of a page with its links pointing to places on the site.

    Args:
        text: Markdown.
        source: the page's path in the repository.
        held: the result of :func:`places`.
        repository: address of the public repository; may be empty.
    """
    here = os.path.dirname(held[source])

    def replaced(found: re.Match[str]) -> str:
        mark, label, target = found.groups()
        if urlsplit(target).scheme or target.startswith("#"):
            return found[0]
        path, hash_sign, anchor = target.partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(source), path))
        if path in held:
            return f"{mark}[{label}]({os.path.relpath(held[path], here or '.')}{hash_sign}{anchor})"
        return f"{mark}[{label}]({repository}/blob/HEAD/{path})" if repository else label

    # re.split with a group: code is at the odd indices.
    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def notebook_page(path: Path, source: str, held: dict[str, str], repository: str = "") -> dict[str, bytes]:
    """The page of a notebook and its pictures: contents by file name.

    Args:
        path: the notebook, with stored outputs.
        source, held, repository: as for :func:`with_site_links`; links stand in Markdown cells.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_site_links(cell.source, source, held, repository)
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": path.stem})
    return {f"{path.stem}.md": text.encode(), **resources["outputs"]}


def stage() -> None:
    """Copy everything that the site holds to build/docs, with its links rewritten."""
    held = places()
    repository = os.environ.get("SPARSEKERN_REPOSITORY", "").rstrip("/")
    shutil.rmtree(STAGED, ignore_errors=True)
    for source, place in held.items():
        target = STAGED / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".ipynb"):
            for name, content in notebook_page(ROOT / source, source, held, repository).items():
                (target.parent / name).write_bytes(content)
        elif target.suffix == ".md":
            text = (ROOT / source).read_text(encoding="utf-8")
            target.write_text(with_site_links(text, source, held, repository), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / source, target)


class _Page(HTMLParser):
    """The anchors of a page, and the targets of its links, images, styles and scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        self.targets += [value for key in ("href", "src") if (value := values.get(key))]


def broken_links(site: Path) -> Iterator[str]:
    """One line for each link between files of a built site that leads nowhere."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            start = site if parts.path.startswith("/") else path.parent
            file = Path(os.path.normpath(start / unquote(parts.path).lstrip("/"))) if parts.path else path
            if file.is_dir():
                file /= "index.html"
            anchor = unquote(parts.fragment)
            if not file.is_file():
                yield f"{path.relative_to(site)}: {target} leads to no file"
            elif anchor and file in pages and anchor not in pages[file].anchors:
                yield f"{path.relative_to(site)}: {target} leads to no anchor"


def reference_faults(site: Path) -> Iterator[str]:
    """One line for each reference page on which a docstring is not shown as it is meant."""
    for path in sorted(site.glob("reference/*/index.html")):
        text = path.read_text(encoding="utf-8")
        if "doc-module" in text:
            yield f"{path.relative_to(site)}: got a module, expected the function in it and a heading"
        for role in sorted(set(re.findall(r":(?:attr|class|data|func|meth|mod):", text))):
            yield f"{path.relative_to(site)}: got {role} as text, expected a link (docs/roles.py)"


def main() -> int:
    stage()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        return done.returncode
    faults = [*broken_links(SITE), *reference_faults(SITE)]
    print("\n".join(faults) or f"{len(list(SITE.rglob('*.html')))} pages, every link leads somewhere")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
