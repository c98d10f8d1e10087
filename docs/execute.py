"""Execute the notebooks: ``pip install -e ".[notebooks]"``, ``python docs/execute.py [NAME...] [--store]``.

Each notebook of docs/notebooks runs from its first cell in a new kernel of this Python, in an empty folder.
The outputs have to be those that are stored, except for numbers and pixels, which depend on the machine.
``--store`` replaces the stored outputs. Exit code 1 if an output differs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from sparsekern.files.atomic import replacing

NOTEBOOKS = Path(__file__).parent / "notebooks"
SECONDS = 600  # longest time of one cell, and of starting a kernel
# Before the first cell: matplotlib makes a cache of fonts at its first import and says so, and timm and
# transformers import torchvision, which may be of another build than torch.
KERNEL_ARGUMENTS = [
    "--IPKernelApp.exec_lines=import matplotlib.font_manager, sparsekern.recipes._torchvision"
]
NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?")


def execute(notebook: NotebookNode) -> NotebookNode:
    """A copy of a notebook with the outputs of a new run.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception or took too long.
    """
    notebook = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            extra_arguments=KERNEL_ARGUMENTS,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    return notebook


def shown(cell: NotebookNode) -> list[str]:
    """What a code cell shows, a text per output: streams with # for numbers, other outputs by their types."""
    found: list[str] = []
    for output in cell.outputs:
        if output.output_type != "stream":
            found.append(" ".join([output.output_type, *sorted(output.get("data", {}))]))
        elif found and found[-1].startswith(f"{output.name}: "):
            found[-1] += output.text
        else:
            found.append(f"{output.name}: {output.text}")
    texts = (NUMBER.sub("#", text) if text.startswith("std") else text for text in found)
    return [re.sub(r"[ \n]+", " ", text) for text in texts]


def stored_faults(notebook: NotebookNode) -> Iterator[str]:
    """One line for each stored output that a reader should not see, and for each that is missing."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        if cell.execution_count != number:
            yield f"code cell {number}: got execution count {cell.execution_count}, expected {number}"
        for text in shown(cell):
            if text.startswith(("stderr", "error")):
                yield f"code cell {number}: got {text[:60]!r}, expected no error and no warning"
    if not any("image/png" in text for cell in cells for text in shown(cell)):
        yield "got no stored picture, expected at least one"


def differences(stored: NotebookNode, again: NotebookNode) -> Iterator[str]:
    """One line for each cell that shows other things than are stored; warnings depend on the machine."""
    for number, (before, after) in enumerate(zip(stored.cells, again.cells, strict=True), 1):
        if before.cell_type != "code":
            continue
        found = [text for text in shown(after) if not text.startswith("stderr")]
        if found != shown(before):
            yield f"cell {number}: got {found}, stored are {shown(before)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="such as unet; all by default")
    parser.add_argument("--store", action="store_true", help="replace the stored outputs")
    arguments = parser.parse_args()
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    for name in arguments.names:
        if name not in known:
            parser.error(f"NAME: got {name!r}, expected one of {', '.join(known)}")
    good = True
    for name in arguments.names or known:
        stored = nbformat.read(known[name], as_version=4)
        again = execute(stored)
        if arguments.store:
            with replacing(known[name]) as path:
                nbformat.write(again, path)
            stored = again
        lines = [*stored_faults(stored), *differences(stored, again)]
        print("\n".join(f"{name}: {line}" for line in lines) or f"{name}: as stored")
        good = good and not lines
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
