"""The notebooks of the documentation run, and show what is stored in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from docs_programs import DOCS, load

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


execute, build = load("execute"), load("build")


def notebook(*sources: str, outputs: list[Any] | None = None) -> Any:
    """A notebook of code cells, all with the same stored outputs."""
    cells = []
    for number, source in enumerate(sources, 1):
        cell = nbformat.v4.new_code_cell(source, outputs=outputs or [], execution_count=number)
        cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_stored(path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if re.search("timm|transformers", path.read_text()):
        pytest.importorskip("timm")
        pytest.importorskip("transformers")
    stored = nbformat.read(path, as_version=4)
    assert list(execute.stored_faults(stored)) == []
    assert list(execute.differences(stored, execute.execute(stored))) == []


def test_there_are_three_notebooks_and_pages_lead_to_each() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"unet", "timm_network", "transformer"}
    index = (DOCS / "index.md").read_text()
    assert all(f"](notebooks/{path.name})" in index for path in NOTEBOOKS)


def test_links_of_notebooks_lead_somewhere() -> None:
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert len(targets) >= 2
        assert [target for target in targets if not (path.parent / target).exists()] == []


def test_a_cell_that_fails_is_an_error() -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="expected seven"):
        execute.execute(notebook("raise ValueError('expected seven')"))


def test_numbers_may_differ_and_words_may_not() -> None:
    def printed(*texts: str) -> Any:
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in texts]
        return notebook("pass", outputs=outputs)

    stored = printed("Dice 0.91\n", "12.5 % of 1,200 stay, 3e-07\n")
    assert list(execute.differences(stored, printed("Dice 0.8\n14 % of 900 stay, 0.0\n"))) == []
    assert len(list(execute.differences(stored, printed("Dice 0.91\n12.5 % of 1,200 go, 3e-07\n")))) == 1
    assert len(list(execute.differences(stored, printed()))) == 1


def test_faults_of_stored_outputs_are_found() -> None:
    warning = nbformat.v4.new_output("stream", name="stderr", text="UserWarning")
    found = list(execute.stored_faults(notebook("pass", outputs=[warning])))
    assert len(found) == 2 and "UserWarning" in found[0] and "picture" in found[1]
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])
    picture = nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": ""})
    assert len(list(execute.stored_faults(notebook("pass", outputs=[picture, error])))) == 1
    empty = notebook("pass", outputs=[picture])
    empty.cells[0].execution_count = None
    assert "execution count None" in next(execute.stored_faults(empty))


def test_a_notebook_becomes_a_page_with_its_pictures(tmp_path: Path) -> None:
    picture = nbformat.v4.new_output("display_data", {"image/png": "QUJD"})
    made = notebook("plot()", outputs=[picture])
    made.cells.insert(
        0, nbformat.v4.new_markdown_cell("# Title\n\n[more](../index.md), [code](../../setup.py)")
    )
    nbformat.write(made, tmp_path / "some.ipynb")
    held = {"docs/notebooks/some.ipynb": "notebooks/some.md", "docs/index.md": "index.md"}
    page = build.notebook_page(tmp_path / "some.ipynb", "docs/notebooks/some.ipynb", held)
    (name,) = page.keys() - {"some.md"}
    text = page["some.md"].decode()
    assert page[name] == b"ABC" and f"]({name})" in text
    assert "# Title\n\n[more](../index.md), code" in text and "```python\nplot()\n```" in text
