"""The machine and versions of a measurement, from :mod:`sparsekern.bench.environment`."""

from __future__ import annotations

from sparsekern.bench.environment import commit as commit
from sparsekern.bench.environment import environment as environment
from sparsekern.bench.environment import kept_memory as kept_memory
