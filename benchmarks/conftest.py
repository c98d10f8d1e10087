"""Checks the compiled core for pytest-benchmark, as `benchmarks/__init__.py` does for `python -m`."""

from __future__ import annotations

import pytest

from benchmarks import require_core


def pytest_configure(config: pytest.Config) -> None:
    """Refuses a package without its compiled core."""
    try:
        require_core()
    except SystemExit as error:
        raise pytest.UsageError(str(error)) from None
