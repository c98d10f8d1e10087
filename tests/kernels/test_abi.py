"""Names that Python and the native code share stand in the same order in both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsekern.kernels import native
from sparsekern.kernels.backends.cpu import step
from sparsekern.kernels.backends.lists import ADAM, MASK, row_arrays
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.rows import RowArrays

CORE: Any = native.load()
needs_core = pytest.mark.skipif(CORE is None, reason="there is no compiled core")


@needs_core
def test_hyperparameters_are_packed_in_the_order_of_the_header() -> None:
    table = SimpleNamespace(tau=101.0, decay=102.0)
    expected: dict[str, float] = {name: float(i + 1) for i, name in enumerate(CORE.HYPER)}
    options = dict(expected)
    for name in ("tau", "decay", "scaled"):
        del options[name]
    options["grad_scale"] = torch.tensor(expected["grad_scale"])
    packed = step._hyper(ADAM, options, table)
    expected |= {"tau": 101.0, "decay": 102.0, "scaled": 1.0}
    assert dict(zip(CORE.HYPER, map(float, packed), strict=True)) == expected


@needs_core
def test_what_is_not_given_changes_nothing() -> None:
    packed = dict(zip(CORE.HYPER, step._hyper(MASK, {}, None), strict=True))
    assert packed == dict.fromkeys(CORE.HYPER, 0.0) | {"grad_scale": 1.0, "tau": 1.0, "decoupled": True}


@needs_core
def test_the_cuda_library_gets_the_same_numbers() -> None:
    assert tuple(name for name, _ in cuda_library.Hyper._fields_) == CORE.HYPER


@needs_core
def test_the_arrays_of_a_table_are_handed_over_in_the_order_of_the_header() -> None:
    assert RowArrays._fields[: len(CORE.ROW_ARRAYS)] == CORE.ROW_ARRAYS
    named = SimpleNamespace(**{name: name for name in CORE.ROW_ARRAYS})
    assert row_arrays(named) == CORE.ROW_ARRAYS  # type: ignore[arg-type]
    assert len(CORE.ROW_ARRAYS) == cuda_library.ROW_ARRAYS
