"""Latency in other runtimes: what is timed, how tables are fitted, and that budgets are met by them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from latency.test_latency import Grouped, everything, half
from prune.networks import Plain, batch
from torch import Tensor, nn

import sparsekern
from sparsekern import latency
from sparsekern.graph import ChannelGraph, trace
from sparsekern.latency import elsewhere
from sparsekern.latency.elsewhere import fit
from sparsekern.latency.units import Models, Unit, group_operations, values_of
from sparsekern.latency.whole import widths_of
from sparsekern.runtimes import check_runtime, installed, names, prepare
from sparsekern.runtimes.session import Session


class Fused(nn.Module):
    """A layer with norm and activation, one that is read twice, and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.twice, self.depth = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        x = self.twice(x)
        x = nn.functional.hardswish(self.depth(torch.relu(x) + x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def units_of(graph: ChannelGraph, kept: np.ndarray) -> list[Unit]:
    sizes = graph.costs.sizes(kept)
    return [Unit(operations, sizes) for operations in group_operations(graph.operations).values()]


def test_a_unit_is_a_layer_with_what_alone_reads_it() -> None:
    graph = trace(Fused(), batch(0))
    names = [
        [operation.target.removeprefix("aten::").partition(".")[0] for operation in unit]
        for unit in group_operations(graph.operations).values()
    ]
    assert ["conv2d", "batch_norm", "relu_"] in names and ["conv2d", "hardswish"] in names
    assert ["conv2d"] in names and ["relu"] in names and ["linear"] in names
    assert sum(map(len, names)) == len(graph.operations)


@pytest.mark.parametrize("network", [Fused, Grouped])
def test_units_compute_in_onnxruntime_what_torch_computes_at_any_width(network: type[nn.Module]) -> None:
    graph = trace(network().eval(), batch(0))
    missing = [*units_of(graph, everything(graph)), *units_of(graph, half(graph))]
    for shared in (True, False):
        models, failed = Models(missing, shared=shared), []
        for unit in missing:
            made = models.model(unit)
            assert made is not None, unit.key
            model, arrays = made
            values = iter(arrays.values())
            given = [
                values_of(operand, shape) if weight else next(values)
                for (operand, weight), shape in zip(unit.inputs(), unit.shapes(), strict=True)
            ]
            try:
                found = Session(model, "onnxruntime", 1).run(arrays)
            except Exception:
                failed.append(unit)
                continue
            for a, b in zip(unit.run(list(map(torch.from_numpy, given))), found, strict=True):
                np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-4, err_msg=unit.key)
        # An exported flatten names the sizes of its result.
        assert len(failed) <= shared
        missing = failed or missing[:1]


def test_nodes_of_a_session_are_timed_without_borders() -> None:
    graph = trace(Fused().eval(), batch(0))
    unit = next(u for u in units_of(graph, everything(graph)) if "batch_norm" in u.key)
    made = Models([unit]).model(unit)
    assert made is not None
    for runtime in installed():
        if runtime in ("onnxruntime", "openvino"):
            session = Session(made[0], runtime, 1, profile=True)
            assert 0 < session.inner_seconds(made[1], passes=6) < 0.1


def test_a_fit_finds_the_law_passes_through_the_first_and_has_no_negative_part() -> None:
    random = np.random.default_rng(0)
    parts = random.uniform(1, 10, (8, 3))
    factors, overhead = fit(parts, parts @ [2.0, 0.5, 0.0] + 3)
    np.testing.assert_allclose([*factors, overhead], [2, 0.5, 0, 3], atol=1e-9)
    seconds = parts @ [2.0, 0.0, -0.3] + 1 + random.normal(0, 0.1, 8)
    factors, overhead = fit(parts, seconds)
    assert (factors >= 0).all() and overhead >= 0
    assert parts[0] @ factors + overhead == pytest.approx(seconds[0])
    # Networks without grouped convolutions have an empty column.
    empty = parts * [1, 0, 1]
    factors, _ = fit(empty, empty @ [2.0, 0.0, 1.0])
    np.testing.assert_allclose(factors[[0, 2]], [2, 1])


def test_tables_of_a_runtime_have_their_own_file_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    seconds: list[float] = []

    def units(found: Mapping[str, Unit], stored: Any, runtime: str) -> None:
        timed.extend(key for key in found if key not in stored.seconds)
        stored.seconds |= {key: 1e-6 + 1e-9 * unit.elements for key, unit in found.items()}

    def networks(found: latency.LatencyModel, *others: Any) -> list[float]:
        timed.append("networks")
        seconds.extend(2e-9 * float(found.of_each(kept).sum()) + 1e-5 for kept in others[2])
        return seconds

    monkeypatch.setattr(sys.modules["sparsekern.latency.measure"], "time_units", units)
    monkeypatch.setattr(elsewhere, "_time_networks", networks)
    model = Plain()
    found = latency.measure(model, trace(model, batch(0)), batch(0), runtime="onnxruntime", cache=tmp_path)
    assert timed[-1] == "networks" and len(timed) > 2
    widths = widths_of(found.graph, found.block)
    assert [1e-9 * found.cost(kept) for kept in widths] == pytest.approx(seconds, rel=1e-6)
    (file,) = tmp_path.iterdir()
    settings = json.loads(file.read_text())["settings"]
    assert settings["runtime"] == "onnxruntime" and settings["version"] == onnxruntime.__version__
    count = len(timed)
    again = latency.measure(model, trace(model, batch(0)), batch(0), runtime="onnxruntime", cache=tmp_path)
    assert len(timed) == count
    np.testing.assert_allclose(again.values, found.values)
    # A budget in that runtime.
    small = sparsekern.prune_once(
        model, batch(0), keep=0.9, of="latency", runtime="onnxruntime", select="magnitude", cache=tmp_path
    )
    graph = trace(model, batch(0))
    kept = everything(graph)
    for name, part in small.plan.tensors.items():
        slots = graph.tensors[name]
        if slots.row_dim in part.keep:
            gone = np.setdiff1d(np.arange(slots.shape[slots.row_dim]), part.keep[slots.row_dim])
            kept[slots.channels[slots.row_dim][gone]] = False
    assert found.cost(kept) <= 0.9 * found.cost(everything(graph))


def test_whole_networks_are_timed_in_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real timer, for orders of magnitude."""
    monkeypatch.setattr(elsewhere, "ROUNDS", 1)
    monkeypatch.setattr(elsewhere, "SHORTEST_NETWORKS", 0.0)
    monkeypatch.setattr(elsewhere, "widths_of", lambda graph, block: [everything(graph), half(graph)])
    model = Plain().eval()
    found = latency.measure(model, trace(model, batch(0)), batch(0), runtime="onnxruntime", cache=tmp_path)
    assert 1e3 < found.cost(everything(found.graph)) < 1e9
    assert found.cost(half(found.graph)) <= found.cost(everything(found.graph))


def test_a_compiled_network_runs() -> None:
    def prepared(monkey: pytest.MonkeyPatch) -> Any:
        monkey.setattr(torch, "compile", lambda network, dynamic: network)
        return prepare.prepare(nn.Linear(3, 2), (torch.ones(1, 3),), {}, "compile", 1)

    with pytest.MonkeyPatch.context() as monkey:
        assert prepared(monkey)().shape == (1, 2)


def test_bad_runtimes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^runtime: got 'tvm', expected one of 'torch', 'compile'"):
        sparsekern.prune_once(Plain(), batch(0), keep=0.5, of="latency", runtime="tvm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^runtime: got 'onnxruntime' with of='macs', expected it with"):
        sparsekern.prune_once(Plain(), batch(0), keep=0.5, runtime="onnxruntime")
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match=r'^runtime: .*install "sparsekern\[openvino\]"'):
        check_runtime("openvino")
