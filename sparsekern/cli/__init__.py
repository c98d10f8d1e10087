"""The command line; bad input gives one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Sequence

import sparsekern.cli.look  # adds its commands, as the two below do
from sparsekern.cli import app

_missing: ImportError | None = None
try:
    import sparsekern.cli.train
    import sparsekern.cli.use  # noqa: F401
except ImportError as error:
    # The commands above need the extra `bench` at most.
    _missing = error


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit code.

    Raises:
        ImportError: the command needs a library that is not installed, or a torchvision that fits torch.
    """
    if _missing is not None and arguments[:1] not in (["info"], ["inspect"], ["bench"]):
        raise _missing
    return app.run(arguments)
