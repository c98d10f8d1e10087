from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sparsekern.kernels import backends


@pytest.fixture
def force_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make every op take one backend until the end of the test."""

    def force(name: str) -> None:
        monkeypatch.setenv("SPARSEKERN_BACKEND", name)
        backends.reset()

    yield force
    monkeypatch.undo()
    backends.reset()
