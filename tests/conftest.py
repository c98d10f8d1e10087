"""For all tests: without a GPU, Triton interprets its kernels; garbage is collected quickly.

Triton reads this variable when it is imported. Importing sparsekern imports ``torch.utils.flop_counter``, and
that imports Triton, so the variable must be set before any test does.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module", autouse=True)
def _collections_skip_what_is_there() -> None:
    """Take what earlier modules and imports have left out of later collections of garbage.

    These are millions of objects, through which every ``gc.collect`` of a test or of a library would look.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end everything is freed again: some bindings warn of what is left."""
    gc.unfreeze()
