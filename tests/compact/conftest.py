from __future__ import annotations

from pathlib import Path

import pytest
from compact.networks import chain, chain_plan, mask_chain

from sparsekern.compact import compact, save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a compact ``Chain``."""
    model = mask_chain(chain())
    save(compact(model, chain_plan(model)), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"
