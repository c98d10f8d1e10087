from __future__ import annotations

import copy
import itertools
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsekern.graph import ChannelGraph, dry_run, trace

Check = Callable[[nn.Module, list[Tensor]], None]

INPUT = torch.zeros(2, 3, 8, 8)


class Layers(nn.Module):
    """Six convolutions with norms, and a demand on their outputs."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 16, 12, 16, 8, 16]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Conv2d(16, 2, 1)
        self.check: Check = lambda model, outputs: None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
            outputs.append(x)
        self.check(self, outputs)
        return self.head(x)


def traced(check: Check) -> tuple[Layers, ChannelGraph]:
    """The network with a demand that was added after its graph was traced."""
    model = Layers()
    graph = trace(model, INPUT)
    assert len(graph.groups) == 6
    model.check = check
    return model, graph


def names(graph: ChannelGraph) -> list[str]:
    return [group.name for group in graph.groups]


def expects(*numbers: int) -> Check:
    """A check that every one of these layers has all its channels."""

    def check(model: nn.Module, outputs: list[Tensor]) -> None:
        for number in numbers:
            full = [16, 16, 12, 16, 8, 16][number]
            if outputs[number].shape[1] != full:
                raise ValueError(f"layer {number} must be {full} wide\nfor reasons")

    return check


def test_a_network_without_hard_coded_sizes_keeps_its_graph() -> None:
    model, graph = traced(lambda model, outputs: None)
    assert dry_run(model, graph, INPUT) is graph


@pytest.mark.parametrize("numbers", [[0], [5], [2, 3], [0, 1, 2, 3, 4, 5]])
def test_groups_at_fault_are_frozen_with_the_error(numbers: list[int]) -> None:
    model, before = traced(expects(*numbers))
    graph = dry_run(model, before, (INPUT,))
    assert names(graph) == [f"convs.{n}" for n in range(6) if n not in numbers]
    frozen = dict(graph.frozen)
    for number in numbers:
        assert f"ValueError: layer {number} must be" in frozen[f"convs.{number}.weight"]
        assert "for reasons" not in frozen[f"convs.{number}.weight"]
    assert len(before.groups) == 6


def fail_in_training(model: nn.Module, outputs: list[Tensor]) -> None:
    if model.training:
        expects(2)(model, outputs)


def fail_together(model: nn.Module, outputs: list[Tensor]) -> None:
    if outputs[1].shape[1] < 16 and outputs[4].shape[1] < 8:
        raise RuntimeError("one of the two must be whole")


def want_equal_widths(model: nn.Module, outputs: list[Tensor]) -> None:
    torch.stack([outputs[0].mean((2, 3)).detach(), outputs[3].mean((2, 3)).detach()])


def test_training_mode_is_tried_too() -> None:
    model, graph = traced(fail_in_training)
    model.eval()
    assert names(dry_run(model, graph, INPUT)) == [f"convs.{n}" for n in (0, 1, 3, 4, 5)]
    assert not any(module.training for module in model.modules())


def test_of_groups_that_fail_together_one_is_frozen() -> None:
    model, graph = traced(fail_together)
    left = names(dry_run(model, graph, INPUT))
    assert len(left) == 5
    assert not {"convs.1", "convs.4"} <= set(left)


def test_widths_that_must_be_equal_are_told_apart() -> None:
    """If both were halved, the dependence would stay hidden."""
    model, graph = traced(want_equal_widths)
    left = names(dry_run(model, graph, INPUT))
    assert not {"convs.0", "convs.3"} & set(left)
    assert len(left) == 4


class Telling(nn.Module):
    """The length of its second output is the width of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 8)
        self.two = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.length: int | None = 8

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.one(x))
        return self.head(torch.relu(self.two(x))), torch.ones(self.length or x.shape[1])


def test_a_group_that_changes_the_output_is_frozen() -> None:
    model, x = Telling(), torch.zeros(2, 3)
    graph = trace(model, x)
    assert names(graph) == ["one", "two"]
    model.length = None
    graph = dry_run(model, graph, x)
    assert names(graph) == ["two"]
    assert "the outputs change their shape with it: [4] for [8]" in dict(graph.frozen)["one.weight"]


def test_sizes_that_depend_on_values_are_no_fault() -> None:
    class Found(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
            self.find = False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layers(x), torch.nonzero(x) if self.find else x

    model, x = Found(), torch.ones(2, 3)
    graph = trace(model, x)
    model.find = True
    assert len(graph.groups) == 1
    assert dry_run(model, graph, x) is graph


def test_nothing_is_touched() -> None:
    model, graph = traced(expects(1))
    seen: list[Tensor] = []
    model.norms[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model.convs[2].eval()
    model.convs[1].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    addresses = [t.data_ptr() for t in model.state_dict().values()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert len(dry_run(model, graph, INPUT).groups) == 5
    assert not seen
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [t.data_ptr() for t in model.state_dict().values()] == addresses
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.convs[1].parameters()] == [False, True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_no_memory_is_used() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU())
    model.append(nn.Linear(4096, 2))
    x = torch.zeros(1024, 64)
    graph = trace(model, x)
    assert len(graph.groups) == 2
    with torch.profiler.profile(profile_memory=True) as profile:
        assert dry_run(model, graph, x) is graph
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) < 1e5


def test_a_single_value_per_channel_is_no_fault() -> None:
    """Batch norm refuses to train on one value; evaluation mode is still tried."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model = nn.Sequential(pool, nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(model.eval(), INPUT)
    assert dry_run(model, graph, INPUT[:1]) is graph


def test_keyword_arguments_and_compiled_models() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor, *, by: Tensor) -> Tensor:
            return self.layers(x) * by

    model, x, kwargs = Scale(), torch.zeros(2, 3), {"by": torch.ones(2)}
    graph = trace(model, x, example_kwargs=kwargs)
    compiled = torch.compile(model, backend="eager")
    assert dry_run(compiled, graph, x, example_kwargs=kwargs) is graph


def test_what_cannot_be_tried_is_refused() -> None:
    model = Layers()
    graph = trace(model, INPUT)
    with pytest.raises(ValueError, match=r"example_inputs: got \(float32.*Layers.forward accepts .*channels"):
        dry_run(model, graph, torch.zeros(2, 4, 8, 8))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="^model: Layers cannot be copied for tracing: .*lock"):
        dry_run(model, graph, INPUT)
    with pytest.raises(ValueError, match=r"model: got str, expected a torch.nn.Module"):
        dry_run("model", graph, INPUT)  # type: ignore[arg-type]
