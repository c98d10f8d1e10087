"""Spoilt calls that reach the emulated CUDA kernels: refused by name, or done as by the reference."""

from __future__ import annotations

import os
from typing import Any

import pytest
from kernels.op_fuzz import drawn, problems

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a crash is found in a forked process")
def test_refused_or_done(emulated: Any) -> None:
    count = int(os.environ.get("SPARSEKERN_FUZZ", "120"))
    assert problems([drawn(seed) for seed in range(20_000, 20_000 + count)], emulated) == []
