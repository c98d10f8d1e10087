"""The comparison with other tools finds out what stayed, whether it is exact, and how long the code is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torch_pruning")
import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers

pytest.importorskip("transformers")

from benchmarks.peers import structures
from benchmarks.peers.structures import Hints, examine
from benchmarks.peers.tools import ONCE, WHILE, lines_of_code

pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Normed(nn.Module):
    """A layer norm over channels that a tool may remove."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def use(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *shape: int) -> None:
    """Let the only network be ``model``."""
    inputs = ((torch.randn(*shape, dtype=torch.float64),), {})
    monkeypatch.setattr(structures, "networks", lambda: {"it": lambda: (model.double().eval(), inputs)})


@pytest.mark.parametrize("tool", structures.TOOLS)
def test_removing_channels_of_convolutions_is_exact(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    use(monkeypatch, convolutions(), 2, 3, 6, 6)
    outcome = examine(tool, "it", False)
    assert outcome.error == "" and outcome.difference < 1e-12
    # Half of 8 filters of 27 weights and a bias each, of 8 gammas and betas, and of 16 weights of the head.
    assert outcome.params_left == pytest.approx((4 * 28 + 8 + 8 + 2) / (8 * 28 + 16 + 16 + 2))
    assert outcome.text.startswith("exact, 0.5")


def test_a_layer_norm_over_removed_channels_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    use(monkeypatch, Normed(), 2, 4)
    assert examine("Torch-Pruning", "it", False).difference > 1e-3
    whole = examine("sparsekern", "it", False)
    assert whole.error == "" and whole.difference < 1e-12 and whole.params_left == 1


def test_an_error_of_a_tool_is_its_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, inputs: Any, hints: Hints) -> Any:
        raise RuntimeError("first line\nsecond line")

    use(monkeypatch, convolutions(), 2, 3, 6, 6)
    monkeypatch.setitem(structures.TOOLS, "sparsekern", fails)
    assert examine("sparsekern", "it", False).text == "fails: RuntimeError: first line"


def test_an_output_of_another_shape_is_an_error() -> None:
    assert "[1, 8] has become [1, 4]" in examine("Torch-Pruning", "outputs", False).error
    assert examine("sparsekern", "outputs", False).error == ""


def test_lines_of_code_are_those_of_the_body() -> None:
    def some(a: int,
             b: int) -> int:  # fmt: skip
        """Says what it does.

        At length.
        """
        # why
        c = [
            a,
        ]

        return c[0] + b

    assert some(1, 2) == 3
    assert lines_of_code(some) == 4
    assert all(lines_of_code(way) >= 2 for way in (*ONCE.values(), *WHILE.values()))
