"""Benchmarks and long studies; their results are in ``results/``."""

from __future__ import annotations

import sys

from sparsekern import info


def require_core() -> None:
    """Ends the process with one sentence where the package has no compiled core."""
    reason = info.missing_core()
    if reason is not None:
        raise SystemExit(f"error: benchmarks need the compiled core; {reason}")


# `python -m` imports this package before the benchmark in it; the name of the program is not known yet.
# Tests also import parts of this package, and they run without a core.
if sys.argv[:1] == ["-m"]:
    require_core()
