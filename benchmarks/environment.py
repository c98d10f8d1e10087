"""Where a measurement was made, as :mod:`sparsekern.bench.environment` says it."""

from __future__ import annotations

from sparsekern.bench.environment import commit as commit
from sparsekern.bench.environment import environment as environment
from sparsekern.bench.environment import kept_memory as kept_memory
