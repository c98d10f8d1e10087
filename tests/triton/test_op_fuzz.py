"""Spoilt calls that reach the interpreted Triton kernels: refused by name, or done as by the reference."""

from __future__ import annotations

import os

import pytest
from kernels.op_fuzz import drawn, problems

from sparsekern.kernels.backends import triton

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a crash is found in a forked process")
def test_refused_or_done() -> None:
    count = int(os.environ.get("SPARSEKERN_FUZZ", "40"))
    assert problems([drawn(seed) for seed in range(30_000, 30_000 + count)], triton) == []
