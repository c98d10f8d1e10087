"""The command line. Bad input gives one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Sequence

import sparsekern.cli.look  # adds its commands to the app, as the imports below do
import sparsekern.cli.selftest
from sparsekern.cli import app

_missing: ImportError | None = None
try:
    import sparsekern.cli.latency
    import sparsekern.cli.train
    import sparsekern.cli.use  # noqa: F401
except ImportError as error:
    # info, inspect, bench and selftest work without these modules.
    _missing = error


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        ImportError: the command needs a library that is not installed, or torchvision does not fit torch.
    """
    if _missing is not None and arguments[:1] not in (["info"], ["inspect"], ["bench"], ["selftest"]):
        raise _missing
    return app.run(arguments)
