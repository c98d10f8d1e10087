"""An extension of Griffe: references such as ``:class:`sparsekern.Pruner``` in docstrings become links.

References to names that the reference pages do not document become code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
REFERENCE = Path(__file__).parent / "reference"
DOCUMENTED = {
    name
    for page in sorted(REFERENCE.glob("*.md"))
    for name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))
}


def without_roles(text: str) -> str:
    """The text of a docstring with links in the form of Markdown."""

    def replaced(found: re.Match[str]) -> str:
        short, name = found.groups()
        shown = name.rpartition(".")[2] if short else name
        known = name in DOCUMENTED or name.rpartition(".")[0] in DOCUMENTED
        return f"[`{shown}`][{name}]" if known else f"`{shown}`"

    return ROLE.sub(replaced, text)


class Roles(griffe.Extension):
    """Rewrites every docstring that Griffe loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value)
