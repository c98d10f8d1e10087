"""What measures time, and what it showed."""

from __future__ import annotations

import sys

from sparsekern import info


def require_core() -> None:
    """Ends the process with one sentence where the package has no compiled core."""
    reason = info.missing_core()
    if reason is not None:
        raise SystemExit(f"error: benchmarks need the compiled core; {reason}")


# With `python -m` this package is imported before the benchmark in it, and the program has no other name yet.
# Tests import parts of it, too, and run without a core.
if sys.argv[:1] == ["-m"]:
    require_core()
