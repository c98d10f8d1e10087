"""Every hard structure is exact, or frozen."""

from __future__ import annotations

import graph.attention_structures
import graph.moving_structures
import graph.value_structures  # noqa: F401
import pytest
import torch
from graph.exactness import check
from graph.structures import STRUCTURES, Net, Piece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

INPUTS = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))]

# Structures that can stand anywhere: they take and give 16 channels of any values.
CHAINABLE = sorted(name for name, s in STRUCTURES.items() if s.out == 16 and s.anywhere)


@pytest.mark.parametrize("name", STRUCTURES)
def test_is_exact_or_frozen(name: str) -> None:
    torch.manual_seed(0)
    structure = STRUCTURES[name]
    graph = check(Net(structure), INPUTS)
    assert graph.num_channels == structure.prunable


class Chain(nn.Module):
    """Structures one after the other; each adds to its input, replaces it, or is joined to it."""

    def __init__(self, names: list[str], joints: list[str]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.pieces = nn.ModuleList(Piece(STRUCTURES[name]) for name in names)
        self.joints = joints
        self.convs = nn.ModuleList(nn.Conv2d(32 if j == "join" else 16, 16, 1) for j in joints)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in joints)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for piece, joint, conv, norm in zip(self.pieces, self.joints, self.convs, self.norms, strict=True):
            y = piece(x)
            if joint == "join":
                x = norm(conv(torch.cat([x, y], 1))).relu()
            elif joint == "add":
                x = x + norm(conv(y))
            else:
                x = y
        return self.head(x)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.lists(
        st.tuples(st.sampled_from(CHAINABLE), st.sampled_from(["join", "add", "pass"])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 1000),
)
def test_chains_of_structures_are_exact(steps: list[tuple[str, str]], seed: int) -> None:
    torch.manual_seed(seed)
    check(Chain([name for name, _ in steps], [joint for _, joint in steps]), INPUTS, seed=seed)
