"""Latency tables: their contents, their interpolation, and their files.

Times depend on the machine, so these tests replace the timer by one that follows a known law. The real timer
is tested for orders of magnitude only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from compact.networks import unchanged
from prune.networks import Plain, Residual, batch
from torch import Tensor, nn

import sparsekern
from sparsekern import latency
from sparsekern.compact import make_plan
from sparsekern.files.cache import directory
from sparsekern.graph import ChannelGraph, trace
from sparsekern.latency import timing, whole
from sparsekern.latency.cache import Cache
from sparsekern.latency.calls import Call
from sparsekern.latency.replay import Replay
from sparsekern.prune.decide.allocate import Global, Problem


class Grouped(nn.Module):
    """Depthwise, grouped and transposed convolutions, a group norm, a concatenation of three, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(4, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.grouped(self.depth(self.stem(x)))))
        x = self.up(x)
        x = torch.cat([x, torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        return self.head(x.mean((2, 3)))


def everything(graph: ChannelGraph) -> np.ndarray:
    return np.ones(graph.num_channels, bool)


def half(graph: ChannelGraph) -> np.ndarray:
    """About half of every group."""
    kept = everything(graph)
    for group in graph.groups:
        kept[group.channels[(len(group.channels) + 1) // 2 :]] = False
    return kept


def seconds(graph: ChannelGraph) -> float:
    """The seconds of a network by the law below."""
    replay = Replay(graph.operations, graph.costs.sizes(everything(graph)), torch.device("cpu"))
    return 1.25 * sum(replay.seconds(timing.Stopwatch(torch.device("cpu")))) + 5e-5


@pytest.fixture
def law(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A microsecond per op and a nanosecond per multiply-add or element; the number of timings is kept."""
    timings = [0]

    def cost(call: Call) -> float:
        timings[0] += 1
        name = call.operation.target.partition(".")[0]
        operands = list(call.operation.operands())
        sizes = [int(np.prod(o.sized(call._sizes))) for o in operands]
        work = sizes[0] * sizes[1] / operands[0].sized(call._sizes)[1] if "conv" in name else sum(sizes)
        return 1e-6 + 1e-9 * work

    monkeypatch.setattr(timing.Stopwatch, "visit", lambda self, run: cost(run))
    monkeypatch.setattr(Call, "prepare", lambda self, device: self)
    monkeypatch.setattr(Replay, "seconds", lambda self, watch: [cost(call) for call in self._calls])

    def networks(found, model, inputs, widths, device):  # type: ignore[no-untyped-def]
        replays = [Replay(found.graph.operations, found.graph.costs.sizes(kept), device) for kept in widths]
        sums = [replay.seconds(None) for replay in replays]  # type: ignore[arg-type]
        # A quarter more than the ops, and 50 microseconds.
        return [1.25 * sum(row) + 5e-5 for row in sums], np.array(sums[: len(whole.EVEN)])

    monkeypatch.setattr(whole, "_time", networks)
    return timings


def measured(model: nn.Module, tmp_path: Path, round_to: int = 1) -> latency.LatencyModel:
    return latency.measure(model, trace(model, batch(0)), batch(0), round_to=round_to, cache=tmp_path)


def test_operations_are_those_that_run_with_the_shapes_that_they_have() -> None:
    model = Grouped().eval()
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    graph = trace(model, x)
    names = [operation.target.partition(".")[0].removeprefix("aten::") for operation in graph.operations]
    assert names.count("conv2d") == 5
    assert {"conv_transpose2d", "group_norm", "relu_", "cat", "linear"} <= set(names)
    first = graph.operations[0]
    image, weight, *_ = first.operands()
    assert image.shape == (2, 3, 8, 8)
    assert image.order == (0, 2, 3, 1)
    assert image.source is None
    kept = everything(graph)
    kept[graph.groups[0].channels[1:]] = False
    # The four groups of the grouped convolution tie four rows to a channel.
    assert weight.sized(graph.costs.sizes(kept))[0] == 4


def test_the_operations_of_a_smaller_network_are_predicted() -> None:
    model = Grouped().eval()
    graph = trace(model, batch(0))
    kept = half(graph)
    small = sparsekern.compact(model, make_plan(graph, kept))
    again = trace(small, batch(0))
    sizes = graph.costs.sizes(kept)
    own = again.costs.sizes(everything(again))
    assert [Call(o, sizes).key for o in graph.operations] == [Call(o, own).key for o in again.operations]


def test_a_replay_runs_every_operation() -> None:
    model = Grouped().eval()
    graph = trace(model, batch(0))
    cpu = torch.device("cpu")
    kept = half(graph)
    for chosen in (everything(graph), kept):
        times = Replay(graph.operations, graph.costs.sizes(chosen), cpu).seconds(timing.Stopwatch(cpu))
        assert len(times) == len(graph.operations)
        assert all(0 < seconds < 1 for seconds in times)


@pytest.mark.parametrize("network", [Plain, Residual, Grouped])
def test_whole_networks_are_met(network: type[nn.Module], law: list[int], tmp_path: Path) -> None:
    found = measured(network(), tmp_path, round_to=4)
    assert found.scale == pytest.approx(1.25, rel=0.02)
    assert found.overhead == pytest.approx(5e4, rel=0.05)


def test_costs_follow_the_law_between_the_widths_that_were_timed(law: list[int], tmp_path: Path) -> None:
    model = Plain(width=64)
    found = measured(model, tmp_path, round_to=2)
    random = np.random.default_rng(0)
    for _ in range(5):
        kept = np.zeros(found.graph.num_channels, bool)
        for group in found.graph.groups:
            width = 2 * int(random.integers(1, len(group.channels) // 2 + 1))
            kept[group.channels[:width]] = True
        sizes = found.graph.costs.sizes(kept)
        cpu = torch.device("cpu")
        truth = sum(Replay(found.graph.operations, sizes, cpu).seconds(timing.Stopwatch(cpu)))
        assert found.of_each(kept).sum() == pytest.approx(1e9 * truth, rel=0.02)


def test_a_price_is_what_the_next_block_saves(law: list[int], tmp_path: Path) -> None:
    found = measured(Plain(width=32), tmp_path, round_to=8)
    kept = everything(found.graph)
    kept[found.graph.groups[1].channels[-3:]] = False
    price = found.price(kept)
    assert (price[~kept] == 0).all()
    for group in found.graph.groups:
        live = group.channels[kept[group.channels]]
        block = (len(live) - 1) % 8 + 1
        less = kept.copy()
        less[live[-block:]] = False
        assert price[live].sum() / len(live) * block == pytest.approx(found.cost(kept) - found.cost(less))


def test_widths_up_to_a_multiple_cost_what_it_does(law: list[int], tmp_path: Path) -> None:
    found = measured(Plain(width=64), tmp_path)
    group = found.graph.groups[0]
    costs = []
    for width in (33, 40, 48, 49):
        kept = everything(found.graph)
        kept[group.channels[width:]] = False
        costs.append(found.cost(kept))
    assert costs[0] == costs[1] == costs[2] < costs[3]


def test_what_was_timed_is_not_timed_again(law: list[int], tmp_path: Path) -> None:
    first = measured(Plain(), tmp_path)
    timings = law[0]
    assert timings > 0
    again = measured(Plain(), tmp_path)
    assert law[0] == timings
    np.testing.assert_array_equal(again.values, first.values)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("latency-")
    settings = json.loads(file.read_text())["settings"]
    assert settings["torch"] == torch.__version__
    assert settings["threads"] == torch.get_num_threads()


def test_other_threads_have_another_file(law: list[int], tmp_path: Path) -> None:
    measured(Plain(), tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        measured(Plain(), tmp_path)
    finally:
        torch.set_num_threads(before)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 7'),
        lambda text: text.replace("sparsekern.latency", "something.else"),
        lambda text: "[]",
        lambda text: text.replace('"seconds": {', '"seconds": {"x": -1.0,'),
    ],
)
def test_a_damaged_file_is_measured_anew_with_a_warning(damage, law: list[int], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = measured(Plain(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(damage(file.read_text()))
    with pytest.warns(UserWarning, match="not a file of latencies"):
        again = measured(Plain(), tmp_path)
    np.testing.assert_allclose(again.values, first.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(Plain(), tmp_path)


def test_entries_of_another_process_are_kept(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    ours, theirs = Cache(tmp_path, cpu), Cache(tmp_path, cpu)
    ours.seconds["a"] = 1.0
    theirs.seconds["b"] = 2.0
    ours.save()
    theirs.save()
    assert Cache(tmp_path, cpu).seconds == {"a": 1.0, "b": 2.0}


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "a"))
    assert directory() == tmp_path / "a"
    assert directory(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("SPARSEKERN_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
        assert directory() == tmp_path / "c" / "sparsekern"


def test_real_times_order_networks_and_leave_the_model_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain(width=64).train()
    model.body.eval()
    random = torch.random.get_rng_state()
    x = batch(0, size=48)
    graph = trace(model, x)
    with unchanged(model):
        found = latency.measure(model, graph, x, round_to=16, cache=tmp_path)
    assert model.training and not model.body.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    costs = []
    for share in (1.0, 0.5, 0.25):
        kept = np.zeros(graph.num_channels, bool)
        for group in graph.groups:
            kept[group.channels[: round(share * len(group.channels))]] = True
        costs.append(found.cost(kept))
    assert costs[0] > 1.3 * costs[1] > 1.3 * costs[2] > 0


def test_a_pruner_keeps_to_a_budget_of_time(law: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Plain(width=32)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = sparsekern.Pruner(
        model,
        optimizer,
        batch(0),
        keep=0.5,
        of="latency",
        steps=20,
        events=3,
        round_to=4,
        shrink=True,
        cache=tmp_path,
    )
    for step in range(20):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.finished
    small, dense = (seconds(trace(net, batch(0))) for net in (model, Plain(width=32)))
    assert 0.4 < small / dense < 0.52


def test_a_time_that_cannot_be_had_is_refused(law: list[int], tmp_path: Path) -> None:
    model = Plain()
    optimizer = sparsekern.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"^keep: got 0.01 of latency, expected at least 0\.\d+"):
        sparsekern.Pruner(model, optimizer, batch(0), keep=0.01, of="latency", steps=20, cache=tmp_path)
    assert not optimizer._optimizer_step_post_hooks


def test_global_keeps_more_of_the_saliency_than_by_multiply_adds(law: list[int], tmp_path: Path) -> None:
    found = measured(Residual(width=32), tmp_path, round_to=4)
    graph = found.graph
    saliency = np.random.default_rng(0).random(graph.num_channels)
    floors = np.ones(len(graph.groups), np.int64)
    allocate, live = Global(balance=0.0), everything(graph)
    whole = graph.cost(live).macs
    budget = 0.5 * found.cost(live)
    by_time = allocate(Problem(graph, saliency, live, budget, "latency", floors, 4, pricing=found))
    assert found.cost(by_time) <= budget
    by_macs = [
        allocate(Problem(graph, saliency, live, share * whole, "macs", floors, 4))
        for share in np.linspace(0.05, 0.95, 37)
    ]
    within = max(saliency[kept].sum() for kept in by_macs if found.cost(kept) <= budget)
    assert saliency[by_time].sum() >= within


def test_the_command_line_of_another_process_uses_the_directory(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))\n"
    )
    command = [sys.executable, "-m", "sparsekern", "inspect", "net:make", "--input", "1,3,32,32"]
    done = subprocess.run(
        [*command, "--keep", "0.9", "--of", "latency", "--round-to", "8", "--threads", "1"],
        cwd=tmp_path,
        env={
            **os.environ,
            "SPARSEKERN_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of latency" in done.stdout
    assert len(list((tmp_path / "cache").iterdir())) == 1
