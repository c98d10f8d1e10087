"""Residual blocks that can be removed as a whole: which are found, and why others are not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from graph.block_networks import WIDTH, Residual, ResNet, block, images, tokens, transformer
from torch import Tensor, nn

import sparsekern
from sparsekern.graph.numbers import after_removal, before_removal


def found(model: nn.Module, x: Tensor, protect: str = "") -> list[str]:
    graph = sparsekern.trace(model.double(), x, depth=True, protect=(protect,) if protect else ())
    return [block.path for block in graph.blocks]


def test_the_blocks_of_a_transformer_end_in_two_projections() -> None:
    _, graph = transformer(drop=0.1)
    assert [block.path for block in graph.blocks] == [f"layers.{n}" for n in range(4)]
    ends = [f"layers.2.{name}" for name in ("attention.proj.weight", "attention.proj.bias", "down.weight")]
    assert set(block(graph, "layers.2").writers) == {*ends, "layers.2.down.bias"}
    assert "layers.2  " in str(graph) and "blocks that can be removed" in str(graph)


def test_the_price_of_a_block_is_all_that_it_computes() -> None:
    model, graph = transformer()
    whole, one = graph.cost(graph.all_channels()), graph.all_channels()
    one[block(graph, "layers.1").channel] = False
    own = sum(parameter.numel() for parameter in model.layers[1].parameters())
    assert whole.params - graph.cost(one).params == own
    assert graph.price(graph.all_channels(), "params")[block(graph, "layers.1").channel] == own
    small = copy.deepcopy(model)
    del small.layers[1]
    small.config.num_hidden_layers = 3
    again = sparsekern.trace(small, tokens())
    assert again.cost(again.all_channels()) == graph.cost(one)


@pytest.mark.parametrize(
    ("first", "blocks"),
    [(nn.ReLU, [0, 1, 2]), (nn.ReLU6, [0, 1, 2]), (nn.Identity, [1, 2]), (nn.Tanh, [1, 2])],
)
def test_a_rectified_sum_is_the_identity_only_of_inputs_that_are_not_negative(
    first: type[nn.Module], blocks: list[int]
) -> None:
    assert found(ResNet(first), images()) == [*(f"stage1.{n}" for n in blocks), "stage2.1"]


class Scaled(nn.Module):
    """A block with a scale per channel at its end, and an op to replace."""

    def __init__(self, op: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        super().__init__()
        self.conv, self.scale, self.op = nn.Conv2d(WIDTH, WIDTH, 1), nn.Parameter(torch.ones(WIDTH, 1, 1)), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.scale * self.conv(x))


def test_the_last_scale_is_the_end_of_a_branch() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, WIDTH, 1)), nn.Sequential(Scaled(), Scaled()), nn.Flatten()
    )
    graph = sparsekern.trace(model.double(), images(), depth=True)
    assert [block.writers for block in graph.blocks] == [("1.0.scale",), ("1.1.scale",)]


@pytest.mark.parametrize(
    "op",
    [
        lambda x, y: 2 * x + y,
        lambda x, y: x + y + 1,
        lambda x, y: torch.add(y, x, alpha=2),
        lambda x, y: (x + y).flip(-1),
        lambda x, y: x * y,
        lambda x, y: (x + y).float().to(x.dtype),
        lambda x, y: y - x,
        lambda x, y: torch.tanh(x + y),
        lambda x, y: x + y.view(-1).add_(1).view_as(y),
        lambda x, y: x.mul_(2) + y,
    ],
)
def test_no_other_block_is_the_identity(op: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.Sequential(Scaled(op), Scaled()), nn.Flatten())
    assert found(model, images()) == ["1.1"]


def test_a_value_changed_in_place_behind_its_name_is_no_zero() -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        y.view(-1)[:3].add_(1)
        return x + y

    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.Sequential(Scaled(op), Scaled()), nn.Flatten())
    assert found(model, images()) == ["1.1"]


class Around(nn.Module):
    """Blocks in a list, called in a way to replace."""

    def __init__(self, call: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.call = nn.Conv2d(3, WIDTH, 1), call
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.blocks, self.stem(x))


def test_a_program_that_counts_its_blocks_keeps_them() -> None:
    def averaged(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for module in blocks:
            x = module(x)
        return x / len(blocks)

    def twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return blocks[2](blocks[1](blocks[0](blocks[0](x))))

    assert found(Around(averaged), images()) == []
    assert found(Around(twice), images()) == []
    assert found(Around(lambda blocks, x: x + sum(module(x) for module in blocks)), images()) == []


def test_protected_and_shared_blocks_stay() -> None:
    model = ResNet(nn.ReLU)
    assert found(model, images(), "stage1.1.conv1.weight") == ["stage1.0", "stage1.2", "stage2.1"]
    model.stage1[2] = Residual()
    model.stage1[2].conv1 = model.stage1[0].conv1
    assert found(model, images()) == ["stage1.1", "stage2.1"]


def test_names_before_and_after() -> None:
    kept = {"layers": (0, 2, 3), "layers.2.inner": (1,)}
    assert after_removal("layers.1.weight", kept) is None
    assert after_removal("layers.2.inner.0.weight", kept) is None
    for name, new in [
        ("layers.2.inner.1.weight", "layers.1.inner.0.weight"),
        ("layers.3.weight", "layers.2.weight"),
        ("layers.scale", "layers.scale"),
        ("head.1", "head.1"),
    ]:
        assert after_removal(name, kept) == new and before_removal(new, kept) == name
    assert before_removal("1.weight", {"": (0, 3)}) == "3.weight"
