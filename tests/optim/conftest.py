from __future__ import annotations

from collections.abc import Iterator

import pytest
from optim.cases import CASES, Case, Under

from sparsekern.kernels import backends

# Not triton: interpreted, a step takes a second.
BACKENDS = [name for name, works, _ in backends.available() if works and name != "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend that works here and is not interpreted, in turn."""
    monkeypatch.setenv("SPARSEKERN_BACKEND", request.param)
    backends.reset()
    yield request.param
    monkeypatch.undo()
    backends.reset()


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=["plain", "table"])
def under(case: Case, request: pytest.FixtureRequest) -> Under:
    """An optimizer under test, without and with a table of live rows (which must not show)."""
    return Under(case, attached=request.param == "table")
