"""Channels under a mean that is divided out go exactly: the weight and the epsilon behind it follow."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from graph.exactness import check, choose, difference, mask, randomise
from graph.residual import (
    Autocast,
    Beforehand,
    BeforehandBorrowed,
    BeforehandMoved,
    Borrowed,
    Called,
    Divided,
    FixedLength,
    GlobalResponse,
    Language,
    MeanOfSizes,
    Norm,
    Numbered,
    Shifted,
    SumByNumber,
    SumBySize,
    Unscaled,
    WrittenOut,
)
from torch import nn

from sparsekern import compact, load, save, trace
from sparsekern.compact import Plan, make_plan
from sparsekern.compact.shrink import shrink
from sparsekern.nn.held_factor import holds_factors

TOKENS = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))
EXACT: dict[str, Norm] = {
    "torch": lambda size: nn.RMSNorm(size, eps=1e-2),
    "torch's epsilon": nn.RMSNorm,
    "written out": WrittenOut,
    "one plus weight": lambda size: WrittenOut(size, 1.0),
    "divided": Divided,
    "mean of sizes": MeanOfSizes,
    "called": Called,
    "fixed length": FixedLength,
    "weight first": Beforehand,
    "weight first, moved": BeforehandMoved,
    "sum by size": SumBySize,
    "sum by number": SumByNumber,
}
REFUSED: dict[str, tuple[Norm, str]] = {
    "number": (
        Numbered,
        "its epsilon 0.01 has to follow their number, and no attribute of a module holds it",
    ),
    "borrowed": (Borrowed, "also reads blocks.0.norm.weight"),
    "weight first, borrowed": (BeforehandBorrowed, "add in .* also reads blocks.0.norm.weight"),
    "unscaled": (Unscaled, "mean in .* reduces over channels"),
    "shifted": (Shifted, "mean in .* reduces over channels"),
    "layer norm": (nn.LayerNorm, "normalises over channels"),
    "no weight": (lambda size: nn.RMSNorm(size, elementwise_affine=False), "normalises over channels"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_the_residual_stream_is_one_group(name: str, tied: bool) -> None:
    torch.manual_seed(0)
    graph = check(Language(EXACT[name], tied=tied), [TOKENS])
    assert [len(group.channels) for group in graph.groups] == [12, 24, 24]
    members = {tensor for tensor, _ in graph.groups[0].members}
    assert {"embedding.weight", "blocks.1.down.weight", "blocks.0.gate.weight", "norm.weight"} <= members


def test_the_residual_stream_goes_under_autocast() -> None:
    torch.manual_seed(0)
    graph = check(Autocast(WrittenOut), [TOKENS])
    assert [len(group.channels) for group in graph.groups] == [12, 24, 24]


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_makes_up_for_stays(name: str) -> None:
    torch.manual_seed(0)
    norm, reason = REFUSED[name]
    graph = check(Language(norm), [TOKENS])
    assert [len(group.channels) for group in graph.groups] == [24, 24]
    assert dict(graph.frozen)["embedding.weight"]
    assert any(re.search(reason, why) for _, why in graph.frozen)


def test_a_global_response_norm() -> None:
    torch.manual_seed(0)
    graph = check(GlobalResponse(), [torch.randn(2, 3, 6, 6)])
    assert [len(group.channels) for group in graph.groups] == [8, 16]


@pytest.fixture
def pruned() -> tuple[nn.Module, nn.Module, Plan]:
    """A network, the same with masked channels, and the plan that removes them."""
    torch.manual_seed(0)
    model = randomise(Language(lambda size: WrittenOut(size, 1.0), tied=True))
    graph = trace(model, TOKENS)
    kept = choose(graph, 1)
    return model, mask(model, graph, kept), make_plan(graph, kept)


def test_the_weight_and_its_epsilon(pruned: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, _, plan = pruned
    small = compact(model, plan)
    left = small.norm.weight.shape[0]
    assert left < 12
    assert small.norm.variance_epsilon == 1e-2 * (12 / left)
    kept = torch.tensor(plan.tensors["norm.weight"].keep[0])
    expected = (1 + model.norm.weight[kept]) * (12 / left) ** 0.5 - 1
    assert torch.allclose(small.norm.weight, expected, rtol=1e-14, atol=0)
    assert model.norm.variance_epsilon == 1e-2


def test_a_shrunk_network_trains_like_the_masked_one(pruned: tuple[nn.Module, nn.Module, Plan]) -> None:
    """Weights, gradients and optimizer state of the norm stay those of the masked network."""
    _, masked, plan = pruned
    live = copy.deepcopy(masked)
    rows = {name: part.keep for name, part in plan.tensors.items()}
    losses = []
    for model, cuts in ((masked, False), (live, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        own = []
        for step in range(6):
            if cuts and step == 3:
                shrink(model, plan, optimizer=optimizer)
            loss = model(TOKENS).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if not cuts or step < 3:
                for name, parameter in model.named_parameters():
                    for dim, indices in rows.get(name, {}).items():
                        gone = np.setdiff1d(np.arange(parameter.shape[dim]), indices)
                        parameter.grad.index_fill_(dim, torch.from_numpy(gone), 0.0)
            optimizer.step()
            own.append(loss.item())
        losses.append(own)
    assert holds_factors(live)
    assert np.allclose(losses[0], losses[1], rtol=1e-11, atol=0)
    kept = torch.tensor(plan.tensors["norm.weight"].keep[0])
    assert torch.allclose(live.norm._parameters["weight"], masked.norm.weight[kept], rtol=1e-9, atol=0)
    assert [name for name, _ in live.named_parameters()] == [name for name, _ in masked.named_parameters()]
    assert difference(live, compact(live, Plan({})), [TOKENS]) < 1e-12


def test_files_and_copies_of_a_shrunk_network(pruned: tuple[nn.Module, nn.Module, Plan], tmp_path) -> None:
    model, masked, plan = pruned
    live = copy.deepcopy(masked)
    shrink(live, plan)
    small = compact(masked, plan)
    for other in (small, copy.deepcopy(live), pickle.loads(pickle.dumps(live)), compact(live, Plan({}))):
        assert difference(masked, other, [TOKENS]) < 1e-12
    assert not holds_factors(compact(live, Plan({})))
    for number, module in enumerate((live, small)):
        save(module, tmp_path / f"{number}.pt")
        loaded = load(model, tmp_path / f"{number}.pt")
        assert difference(masked, loaded, [TOKENS]) < 1e-12
    assert torch.equal(loaded.eval()(TOKENS), small.eval()(TOKENS))
    assert type(loaded.norm) is WrittenOut


def test_several_cuts_give_the_same_epsilon(pruned: tuple[nn.Module, nn.Module, Plan]) -> None:
    model, _, _ = pruned
    graph = trace(model, TOKENS)
    first, second = np.ones(graph.num_channels, bool), np.ones(graph.num_channels, bool)
    first[[1, 4, 5]] = second[[1, 4, 5, 6, 7]] = False
    live = copy.deepcopy(model)
    once, twice = make_plan(graph, second), make_plan(graph, first)
    shrink(live, twice)
    shrink(live, once.after(twice))
    small = compact(model, once)
    assert live.norm.variance_epsilon == small.norm.variance_epsilon
    assert difference(live, small, [TOKENS]) < 1e-12
    assert Plan.from_json(once.to_json()) == once
