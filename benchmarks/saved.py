"""The files that a measurement leaves in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsekern.files.atomic import replacing

RESULTS = Path(__file__).parent / "results"


def save(name: str, console: Console, record: Any = None) -> None:
    """Write ``NAME.txt`` and ``NAME.json``, each whole or not at all.

    Args:
        name: the name of the files.
        console: a recording console; its text goes to the text file.
        record: plain data for JSON; None for no such file.

    Raises:
        OSError: a file cannot be written.
    """
    texts = {".txt": console.export_text()}
    if record is not None:
        texts[".json"] = json.dumps(record, indent=1) + "\n"
    for suffix, text in texts.items():
        with replacing(RESULTS / f"{name}{suffix}") as path:
            path.write_text(text)
