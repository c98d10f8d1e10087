"""Mixtures of experts: the channels inside and around them go, whole experts do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graph.exactness import check, choose, difference, mask, randomise
from graph.residual import WrittenOut
from torch import Tensor, nn

from sparsekern.compact import compact, make_plan
from sparsekern.graph import trace

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Two of four gated experts for every token, in the ways in which transformers computes them."""

    def __init__(self, how: str, bias: bool = False) -> None:
        super().__init__()
        self.how, self.gate = how, nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 24, 8)), nn.Parameter(torch.randn(4, 8, 12))
        self.bias = nn.Parameter(torch.randn(4, 24)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, experts = self.gate(flat).softmax(-1).topk(2, -1)
        y = flat.repeat_interleave(2, 0)
        experts = experts.flatten()
        made = self.grouped(y, experts) if self.how == "grouped" else self.batched(y, experts)
        return (made * weights.reshape(-1, 1)).view(len(flat), 2, -1).sum(1).view(*x.shape[:2], -1)

    def batched(self, x: Tensor, experts: Tensor) -> Tensor:
        if self.how == "transposed":
            y = torch.bmm(x.unsqueeze(1), self.up.transpose(1, 2)[experts]).squeeze(1)
        else:
            y = torch.bmm(self.up[experts], x.unsqueeze(-1)).squeeze(-1)
        if self.bias is not None:
            y = y + self.bias[experts]
        gate, y = y.chunk(2, -1)
        return torch.bmm(self.down[experts], (F.silu(gate) * y).unsqueeze(-1)).squeeze(-1)

    def grouped(self, x: Tensor, experts: Tensor) -> Tensor:
        pytest.importorskip("transformers.integrations.moe")
        product = torch.ops.transformers.grouped_mm_fallback
        order = experts.argsort()
        ends = (experts[:, None] == torch.arange(4)).sum(0).cumsum(0).to(torch.int32)
        y = product(x[order], self.up.transpose(1, 2), ends)
        gate, y = y.chunk(2, -1)
        return product(F.silu(gate) * y, self.down.transpose(1, 2), ends)[order.argsort()]


class Network(nn.Module):
    """Experts in a residual stream under norms."""

    def __init__(self, how: str, bias: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.experts, self.before, self.last = Experts(how, bias), WrittenOut(8), WrittenOut(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x + self.experts(self.before(x))))


@pytest.mark.parametrize("how", ["batched", "transposed"])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_that_data_picks(how: str, bias: bool) -> None:
    torch.manual_seed(0)
    graph = check(Network(how, bias), [X])
    assert [len(group.channels) for group in graph.groups] == [8, 12]


def test_grouped_products() -> None:
    """The counter of torch does not know the op, so that costs are not compared."""
    torch.manual_seed(0)
    model = randomise(Network("grouped"))
    graph = trace(model, X.double())
    assert [len(group.channels) for group in graph.groups] == [8, 12]
    kept = choose(graph, 0)
    small, masked = compact(model, make_plan(graph, kept)), mask(model, graph, kept)
    assert difference(masked, small, [X.double()]) < 1e-12
    assert difference(masked, model, [X.double()]) > 1e-9
