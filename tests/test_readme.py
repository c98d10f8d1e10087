"""The code in the README runs unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from prune.networks import Plain, batch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    steps = 30
    torch.manual_seed(0)
    scope: dict[str, Any] = {
        "model": Plain(),
        "make_model": Plain,
        "criterion": nn.CrossEntropyLoss(),
        "example_inputs": batch(0),
        "loader": [(batch(step), torch.arange(4) % 4) for step in range(steps)],
        "total_steps": steps,
        "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(Plain().parameters()), 1),
    }
    for block in blocks:
        exec(block, scope)
    assert scope["pruner"].metrics()["macs_share"] <= 0.2
    assert scope["small"].stem[0].out_channels < 16
    assert (tmp_path / "small.safetensors").exists()
    assert scope["network"].stem[0].out_channels <= 16
    assert 0 < scope["milliseconds"] < 1e3
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert scope["extra"] == {"scheduler": scope["scheduler"].state_dict()}
