"""Training modes that read values: traced if the program has one path, else reported with the line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph.exactness import check
from torch import Tensor, nn
from torch.utils import checkpoint

from sparsekern.graph import trace

X = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    """Two convolutions and a head; ``between`` is applied to the first one's output."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)
        self.register_buffer("mean", torch.zeros(8))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self, self.norm(self.first(x)).relu())
        return self.head(self.second(y).relu())


def as_it_is(net: Net, y: Tensor) -> Tensor:
    return y


def guarded(net: Net, y: Tensor) -> Tensor:
    if net.training and not torch.isfinite(y).all():
        raise FloatingPointError("not finite")
    return y


def guarded_twice(net: Net, y: Tensor) -> Tensor:
    if net.training and y.isnan().any():
        raise FloatingPointError("NaN")
    if net.training:
        assert y.abs().max() < 1e9, "large"
    return y


def said(net: Net, y: Tensor) -> Tensor:
    if net.training and torch.isnan(y).any():
        print("NaN")
    return y


def asserted(net: Net, y: Tensor) -> Tensor:
    assert y.min() >= 0
    torch._assert(y.max() < 1e9, "large")
    return y


def logged(net: Net, y: Tensor) -> Tensor:
    if net.training:
        net.log = {"mean": y.mean().item(), "max": float(y.max())}
        print(f"{y.mean():.3f}", y.max())
    return y


def averaged(net: Net, y: Tensor) -> Tensor:
    if net.training:
        net.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
    return y


def averaged_anew(net: Net, y: Tensor) -> Tensor:
    if net.training:
        net.mean = 0.9 * net.mean + 0.1 * y.detach().mean((0, 2, 3))
    return y


def checkpointed(net: Net, y: Tensor) -> Tensor:
    return checkpoint.checkpoint(F.relu, y, use_reentrant=False)


def clamped(net: Net, y: Tensor) -> Tensor:
    # As transformers' detectors do in half precision.
    for _ in range(2):
        if net.training and not torch.isfinite(y).all():
            y = torch.clamp(y, -1e9, 1e9)
    return y


def clamped_if_infinite_or_nan(net: Net, y: Tensor) -> Tensor:
    if net.training and (torch.isinf(y).any() or torch.isnan(y).any()):
        y = torch.clamp(y, -1e9, 1e9)
    return y


def skipped_in_a_residual(net: Net, y: Tensor) -> Tensor:
    for _ in range(3):
        if not (net.training and torch.rand([]) < 0.0):
            y = y + net.inner(y)
    return y


def dropped_by_image(net: Net, y: Tensor) -> Tensor:
    return y * (torch.rand(len(y), 1, 1, 1) < 2).to(y) if net.training else y


ONE_COURSE = [
    guarded,
    guarded_twice,
    said,
    asserted,
    logged,
    averaged,
    averaged_anew,
    checkpointed,
    dropped_by_image,
    clamped,
    clamped_if_infinite_or_nan,
]


@pytest.mark.parametrize("between", ONE_COURSE)
def test_one_course_is_followed(between: Callable[[Net, Tensor], Tensor]) -> None:
    graph = check(Net(between), (X,))
    assert graph.num_channels == 16
    assert graph.untraced == ""


def test_layers_that_are_skipped_by_chance() -> None:
    net = Net(skipped_in_a_residual)
    net.inner = nn.Conv2d(8, 8, 3, padding=1)
    graph = check(net, (X,))
    assert [group.name for group in graph.groups] == ["first", "second"]
    assert graph.untraced == ""


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    trace(Net(logged), X)
    assert capfd.readouterr() == ("", "")


def test_a_batch_norm_that_averages_over_all_batches() -> None:
    net = Net(as_it_is, nn.BatchNorm2d(8, momentum=None))
    assert trace(net, X).num_channels == 16
    assert int(net.norm.num_batches_tracked) == 0
    check(net, (X,))


def skipped(net: Net, y: Tensor) -> Tensor:
    return y if net.training and torch.rand(1) < 0.5 else net.second(y)


def started(net: Net, y: Tensor) -> Tensor:
    if net.training and net.mean.sum() == 0:
        net.mean.copy_(y.detach().mean((0, 2, 3)))
    return y


def as_many_as_a_value(net: Net, y: Tensor) -> Tensor:
    return y + y.new_zeros(int(y.sum())).sum() if net.training else y


def turned_twice(net: Net, y: Tensor) -> Tensor:
    # Both courses alike leave the channels in their order; one decision for each does not.
    for _ in range(2):
        if net.training and y.isnan().any():
            y = y.flip(1)
    return y


def scaled_by_its_mean(net: Net, y: Tensor) -> Tensor:
    # The masked network and the smaller one have other means, so they may decide otherwise.
    return y * 2 if net.training and y.mean() > 0.1 else y


@pytest.mark.parametrize("between", [skipped, started, as_many_as_a_value, turned_twice, scaled_by_its_mean])
def test_several_courses_are_refused_by_line(between: Callable[[Net, Tensor], Tensor]) -> None:
    line = between.__code__.co_firstlineno
    with pytest.raises(
        ValueError, match=r"^model: in training mode Net.forward decides by the values"
    ) as caught:
        trace(Net(between), X)
    file, found = re.search(r"at (\S+):(\d+), expected", str(caught.value)).groups()  # type: ignore[union-attr]
    assert file == __file__
    assert line < int(found) <= line + 4


def as_an_array(net: Net, y: Tensor) -> Tensor:
    if net.training:
        net.histogram = y.detach().cpu().numpy().mean()
    return y


class WithLoss(Net):
    """Gives its loss in training."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        y = super().forward(x)
        if not self.training:
            return y
        if target is None:
            raise ValueError("targets should be given in training mode")
        return F.mse_loss(y, target)


@pytest.mark.parametrize(
    ("net", "said"), [(Net(as_an_array), "numpy"), (WithLoss(as_it_is), "targets should be given")]
)
def test_evaluation_mode_alone_is_traced_with_a_warning(net: nn.Module, said: str) -> None:
    with pytest.warns(UserWarning, match="model: only evaluation mode was traced.*" + said) as caught:
        graph = trace(net, X)
    assert caught[0].filename == __file__
    assert [group.name for group in graph.groups] == ["first", "second"]
    assert said in graph.untraced
    assert f"training mode was not traced: {graph.untraced}" in str(graph)
    assert __file__ in graph.untraced
    assert graph.freeze(["first"], "a test").untraced == graph.untraced


def test_a_loss_in_the_forward() -> None:
    example = {"target": torch.zeros(2, 2, 8, 8)}
    assert trace(WithLoss(as_it_is), X, example_kwargs=example).untraced == ""


def test_parameters_of_training_mode_alone_are_not_guessed_at() -> None:
    class Auxiliary(Net):
        def __init__(self) -> None:
            super().__init__(as_an_array)
            self.more = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, self.more(self.first(x))) if self.training else y

    with pytest.raises(ValueError, match=r"numpy.*training mode alone may read 2 parameters \(more.weight"):
        trace(Auxiliary(), X)
