"""Programs whose control flow or sizes depend on data freeze the channels involved or are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsekern.graph import trace

X = torch.zeros(2, 3, 4, 4)


class Net(nn.Module):
    """Three convolutions; ``middle`` transforms the first one's output, which the others read."""

    def __init__(self, middle: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.middle(self, self.first(x).relu())))


def positions(net: Net, x: Tensor) -> Tensor:
    return x + (x > 0).nonzero().sum()


def images_that_are_not_empty(net: Net, x: Tensor) -> Tensor:
    return x[x.sum((1, 2, 3)) > 0]


def chosen_images(net: Net, x: Tensor) -> Tensor:
    return x[(x.sum((1, 2, 3)) > 0).nonzero()[:, 0]]


def distinct_values(net: Net, x: Tensor) -> Tensor:
    return x * torch.unique(x).sum()


def number_from_a_tensor(net: Net, x: Tensor) -> Tensor:
    return x * x.max().item()


def list_from_a_tensor(net: Net, x: Tensor) -> Tensor:
    return x * x.argmax(1).flatten().tolist()[0]


@pytest.mark.parametrize(
    "middle",
    [
        positions,
        images_that_are_not_empty,
        chosen_images,
        distinct_values,
        number_from_a_tensor,
        list_from_a_tensor,
    ],
)
def test_freezes_what_it_touches(middle: Callable[[Net, Tensor], Tensor]) -> None:
    graph = trace(Net(middle), X)
    assert "first.weight" in dict(graph.frozen)


def decides_by_a_number(net: Net, x: Tensor) -> Tensor:
    return net.second(x) if x.max().item() > 0 else x


def decides_by_a_tensor(net: Net, x: Tensor) -> Tensor:
    return net.second(x) if x.max() > 0 else x


def as_many_as_a_value(net: Net, x: Tensor) -> Tensor:
    return x + torch.zeros(int(x.sum().item())).sum()


def drops_in_training(net: Net, x: Tensor) -> Tensor:
    return x if net.training and torch.rand(1).item() < 0.5 else net.second(x)


@pytest.mark.parametrize(
    ("middle", "mode"),
    [
        (decides_by_a_number, "evaluation"),
        (decides_by_a_tensor, "evaluation"),
        (as_many_as_a_value, "evaluation"),
        (drops_in_training, "training"),
    ],
)
def test_is_refused(
    middle: Callable[[Net, Tensor], Tensor], mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError, match=f"^model: in {mode} mode Net.forward decides by the values in tensors"
    ):
        trace(Net(middle), X)
    assert capfd.readouterr() == ("", "")


def test_a_program_that_does_not_repeat_is_refused() -> None:
    class Alternating(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (1 + self.calls % 3)

    with pytest.raises(ValueError, match="^model: a second run of its forward differs from the first"):
        trace(Alternating(lambda net, x: x), X)
