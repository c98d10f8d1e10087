"""An extension of Griffe: references such as ``:class:`sparsekern.Pruner``` in docstrings become links.

References to names that the reference pages do not document become code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
# A name, and the public name of a function whose module has the same name.
DIRECTIVE = re.compile(r"^::: ([\w.]+)(?:\n    options:\n      heading: ([\w.]+))?$", re.MULTILINE)


def documented(reference: Path) -> dict[str, str]:
    """The identifier of every name on the pages of the folder ``reference``, by its public name."""
    found = {}
    for page in sorted(reference.glob("*.md")):
        for identifier, heading in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            found[heading or identifier] = identifier
    return found


DOCUMENTED = documented(Path(__file__).parent / "reference")


def without_roles(text: str, names: dict[str, str]) -> str:
    """The text of a docstring with its references in the form of Markdown.

    Args:
        text: the docstring.
        names: the result of :func:`documented`.
    """

    def replaced(found: re.Match[str]) -> str:
        short, name = found.groups()
        shown = name.rpartition(".")[2] if short else name
        owner, _, member = name.rpartition(".")
        if name in names:
            return f"[`{shown}`][{names[name]}]"
        return f"[`{shown}`][{names[owner]}.{member}]" if owner in names else f"`{shown}`"

    return ROLE.sub(replaced, text)


class Roles(griffe.Extension):
    """Rewrites every docstring that Griffe loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value, DOCUMENTED)
