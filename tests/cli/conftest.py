"""One small training for all tests of the command line."""

from __future__ import annotations

import pytest
from recipes.folders import write_data

from sparsekern.cli import run

SMALL = ["--width", "3", "--depth", "2", "--batch", "2", "--crop", "32", "--evaluations", "1"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The directory of a pruned UNet of two classes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    command = ["train", "--data", str(data), *SMALL, "--steps", "8", "--keep", "0.5", "--out", str(out)]
    assert run([*command, "--quiet"]) == 0
    return out
