"""Units of recurrent layers go with the rows of all gates and the columns of the state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph.exactness import check
from torch import Tensor, nn

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """An embedding layer, a recurrence, and a head that reads every state, or the last one."""

    def __init__(self, kind: Any, *, last: bool = False, start: bool = False, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.last, self.start = last, nn.Parameter(torch.randn(1, 1, 8)) if start else None
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.start is not None:
            states, _ = self.rnn(x, self.start.expand(1, x.shape[0], 8).contiguous())
        else:
            states, end = self.rnn(x)
            if self.last:
                states = (end[0] if isinstance(end, tuple) else end)[-1]
        return self.head(states)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{}, {"last": True}, {"bidirectional": True, "num_layers": 2}, {"bias": False}],
    ids=["states", "last", "deep", "no bias"],
)
def test_units_go(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    graph = check(Tagger(kind, **options), [X])
    assert [len(group.channels) for group in graph.groups] == [6, 8]


def test_a_start_that_is_learned_keeps_the_units() -> None:
    torch.manual_seed(0)
    graph = check(Tagger(nn.GRU, start=True), [X])
    assert [len(group.channels) for group in graph.groups] == []


def test_projections_keep_the_units() -> None:
    torch.manual_seed(0)
    model = Tagger(nn.LSTM, proj_size=4)
    model.head = nn.Linear(4, 3)
    assert check(model, [X]).num_channels == 0
