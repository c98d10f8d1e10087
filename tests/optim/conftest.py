from __future__ import annotations

from collections.abc import Iterator

import pytest
from optim.cases import CASES, Case, OptimizerFactory

from sparsekern.kernels import backends

# Without triton: a step takes 1 s in its interpreter.
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
def under(case: Case, request: pytest.FixtureRequest) -> OptimizerFactory:
    """A factory of optimizers, without and with a table of live rows, which must not change results."""
    return OptimizerFactory(case, attached=request.param == "table")
