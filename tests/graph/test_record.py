"""Exports and runs of a trace: one export where both modes agree, and proofs on records of runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph.exactness import check
from torch import Tensor, nn

from sparsekern.graph import trace

X = torch.rand(2, 5, 16)


class Attention(nn.Module):
    """Heads behind ``transpose(1, 2).contiguous()``, which does nothing for a single head."""

    def __init__(self, heads: int, written: bool = False) -> None:
        super().__init__()
        self.num_heads, self.written = heads, written
        self.q, self.k, self.v = (nn.Linear(16, 8 * heads) for _ in range(3))
        self.proj = nn.Linear(8 * heads, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, self.num_heads, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
        return self.proj(y.view(b, n, -1))


class Written(Attention):
    """Writes to a copy, which is its operand where there is a single head."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        v = self.v(x).view(b, n, self.num_heads, 8).transpose(1, 2)
        y = v.contiguous().mul_(2)
        return self.proj((v + y).transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("heads", [2, 3, 4])
def test_few_heads_go_where_a_copy_is_no_op_for_one(heads: int) -> None:
    graph = check(Attention(heads), (X,))
    assert len(graph.groups) == 1
    assert graph.num_channels == heads


def test_a_copy_that_is_written_to_is_no_detail() -> None:
    graph = trace(Written(2), X)
    assert graph.num_channels == 0 or "v" not in {group.name for group in graph.groups}


def test_a_forward_that_refuses_marked_numbers_is_traced() -> None:
    class Strict(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if type(self.num_heads) is not int:
                raise RuntimeError("num_heads: expected an int")
            return super().forward(x)

    assert trace(nn.Sequential(Strict(4), nn.Linear(6, 8), nn.Linear(8, 2)), X).num_channels == 6 + 8


class Layer(nn.Linear):
    """A subclass of a layer whose own size attribute counts channels in a reshape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(*x.shape[:-1], self.out_features, 1).squeeze(-1)


def test_an_attribute_that_is_set_twice_is_restored() -> None:
    graph = check(nn.Sequential(Layer(16, 12), nn.ReLU(), Layer(12, 10), nn.ReLU(), nn.Linear(10, 3)), (X,))
    assert [len(group.channels) for group in graph.groups] == [12, 10]


def exports(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The modes in which models are exported from now on."""
    modes: list[bool] = []
    export = torch.export.export

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes.append(model.training)
        return export(model, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return modes


class Block(nn.Module):
    """A batch norm and dropout; ``own`` adds a layer that training mode alone runs."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.first = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)
        self.more = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.norm(self.first(x)).relu(), 0.1, self.training)
        return self.head(y) + self.more(y) if self.own and self.training else self.head(y)


@pytest.mark.parametrize(("own", "expected"), [(False, [False]), (True, [False, True])])
def test_one_export_where_both_modes_agree(
    own: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = exports(monkeypatch)
    graph = trace(Block(own), torch.zeros(2, 3, 4, 4))
    assert modes == expected
    assert graph.untraced == ""
    assert ("more.weight" in graph.tensors) == own


class Made(nn.Module):
    """Norms with the epsilon that is torch's default, and tensors that the forward makes.

    ``drops`` leaves the branch out by chance in training, as stochastic depth does.
    """

    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.drops = drops
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 16)
        self.norm, self.groups = nn.LayerNorm(16), nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(self.groups(self.norm(x).transpose(1, 2)).transpose(1, 2)).relu())
        if self.drops and self.training:
            kept = torch.empty((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)
            y = y * kept.bernoulli_(0.9).div_(0.9)
        filled = torch.empty_like(x).fill_(2.0)
        return x + y * filled + torch.zeros(16, dtype=x.dtype) + torch.arange(16)


@pytest.mark.parametrize(("drops", "expected"), [(False, [False]), (True, [False, True])])
def test_a_proof_on_runs_knows_defaults_and_tensors_that_are_made(
    drops: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = exports(monkeypatch)
    graph = trace(Made(drops), X)
    assert [len(group.channels) for group in graph.groups] == [8]
    # No smaller copy had to be exported.
    assert modes == expected


def test_a_training_mode_that_differs_where_it_is_smaller_is_found() -> None:
    class Sized(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y.sigmoid() if self.training and y.shape[-1] < 8 else y.relu())

    graph = trace(Sized(nn.Linear(16, 8), nn.Linear(8, 2)), X)
    assert graph.num_channels == 0
    assert "training mode runs other ops where it is smaller" in dict(graph.frozen)["0.weight"]
