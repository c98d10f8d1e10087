"""Timing units and whole networks in other runtimes, and fitting the tables to the whole networks."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from time import perf_counter

import numpy as np
import torch
from torch import nn

from sparsekern.compact import compact, make_plan
from sparsekern.graph.capture.courses import first_line
from sparsekern.graph.propagate.operations import Operation
from sparsekern.latency.cache import Cache
from sparsekern.latency.model import LatencyModel
from sparsekern.latency.timing import Stopwatch
from sparsekern.latency.units import Models, Unit
from sparsekern.latency.whole import Example, network_key, widths_of
from sparsekern.runtimes import Runtime
from sparsekern.runtimes.prepare import prepare
from sparsekern.runtimes.session import Session

_LOG = logging.getLogger(__name__)

# A unit is run for SHORTEST seconds, at least LEAST and at most MOST times.
SHORTEST, LEAST, MOST = 0.02, 5, 100
# Each round times all networks once.
ROUNDS, MOST_ROUNDS, SHORTEST_NETWORKS = 15, 100, 3.0

# Ops that do most of the work, by the beginning of the name. Runtimes fuse the others into them.
_HEAVY = ("aten::conv", "aten::linear", "aten::addmm", "aten::matmul", "aten::bmm", "aten::scaled_dot")


def time_units(units: Mapping[str, Unit], stored: Cache, runtime: Runtime) -> None:
    """Time the units that are not stored yet in a runtime and store their seconds.

    Units that the runtime or the exporter does not know are left out.

    Raises:
        RuntimeError: the runtime runs none of the units.
    """
    missing = {key: unit for key, unit in units.items() if key not in stored.seconds}
    if not missing:
        return
    _LOG.info("timing %d units of %d in %s; kept in %s", len(missing), len(units), runtime, stored.path)
    problem = ""
    for shared in (True, False):
        models = Models(list(missing.values()), shared=shared)
        for key, unit in list(missing.items()):
            try:
                made = models.model(unit)
                if made is not None:
                    stored.seconds[key] = _seconds(*made, runtime)
                    del missing[key]
            except Exception as error:
                # Runtimes raise errors of many classes for ops and sizes that they do not know.
                problem = f"{key}: {first_line(error)}"
                _LOG.debug("%s does not run %s", runtime, problem)
    if missing:
        _LOG.info("%s runs none of %s", runtime, ", ".join(missing))
    if not any(key in stored.seconds for key in units):
        raise RuntimeError(f"runtime: got {runtime!r}, which runs none of the ops of the network; {problem}")
    stored.save()


def _seconds(model: bytes, arrays: Mapping[str, np.ndarray], runtime: Runtime) -> float:
    """Seconds of the nodes of a model in one pass."""
    session = Session(model, runtime, torch.get_num_threads(), profile=True)
    session.run(arrays)
    begin = perf_counter()
    session.run(arrays)
    passes = int(np.clip(SHORTEST / max(perf_counter() - begin, 1e-9), LEAST, MOST))
    return session.inner_seconds(arrays, passes)


def fit_networks(
    found: LatencyModel,
    model: nn.Module,
    example: Example,
    stored: Cache,
    device: torch.device,
    runtime: Runtime,
) -> None:
    """Time whole networks in a runtime, and fit the model to them, in place.

    The tables of the ops that do most of the work, of grouped convolutions, and of all other ops get a factor
    each; there is an overhead, too.

    Args:
        found: the model to correct.
        model: the network; it is not changed.
        example: arguments of its forward pass.
        stored: known timings; new ones are added and saved.
        device: device of the network.
        runtime: where the networks run.
    """
    graph = found.graph
    widths = widths_of(graph, found.block)
    keys = [network_key(graph.operations, graph.costs.sizes(kept)) for kept in widths]
    if any(key not in stored.seconds for key in keys):
        _LOG.info("timing %d networks in %s", len(keys), runtime)
        found_seconds = _time_networks(found, model, example, widths, device, runtime)
        stored.seconds |= dict(zip(keys, found_seconds, strict=True))
        stored.save()
    seconds = 1e9 * np.array([stored.seconds[key] for key in keys])
    kinds = _kinds(graph.operations)
    each = np.array([found.of_each(kept) for kept in widths])
    parts = np.stack([each[:, kinds == kind].sum(axis=1) for kind in range(3)], axis=1)
    factors, overhead = fit(parts, seconds)
    found.weigh(factors[kinds])
    found.scale, found.overhead = 1.0, overhead


def _kinds(operations: Sequence[Operation]) -> np.ndarray:
    """0 for ops that do most of the work, 1 for grouped convolutions, 2 for others: int64 ``[ops]``."""

    def kind(operation: Operation) -> int:
        if not operation.target.startswith(_HEAVY):
            return 2
        groups = operation.args[6] if "conv" in operation.target and len(operation.args) > 6 else 1
        return int(isinstance(groups, int) and groups > 1)

    return np.array([kind(operation) for operation in operations], np.int64)


def fit(parts: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit ``seconds = parts @ factors + overhead`` with factors and overhead of at least 0.

    The fit minimises the squared relative errors over all subsets of the unknowns that may be zero. The
    result is scaled to pass through the first network, the full one, because budgets are shares of its time.

    Args:
        parts: float64 ``[n, k]``, summed times of the ops of each kind.
        seconds: float64 ``[n]``, times of the whole networks.

    Returns:
        The factors ``[k]`` and the overhead.
    """
    columns = np.column_stack([parts, np.ones(len(parts))]) / seconds[:, None]
    best, least = np.zeros(columns.shape[1]), np.inf
    for used in _subsets(columns):
        solution = np.zeros(columns.shape[1])
        solution[used] = np.linalg.lstsq(columns[:, used], np.ones(len(seconds)), rcond=None)[0]
        error = float(((columns @ solution - 1) ** 2).sum())
        if (solution >= 0).all() and error < least - 1e-12:
            best, least = solution, error
    full = float(columns[0] @ best)
    best = best / full if full > 0 else best
    return best[:-1], float(best[-1])


def _subsets(columns: np.ndarray) -> Iterator[np.ndarray]:
    """The non-empty subsets of the columns that are not all zero, as bool arrays."""
    present = np.abs(columns).max(axis=0) > 0
    for chosen in product((False, True), repeat=columns.shape[1]):
        used = np.array(chosen) & present
        if used.any() and (used == np.array(chosen)).all():
            yield used


def _time_networks(
    found: LatencyModel,
    model: nn.Module,
    example: Example,
    widths: Sequence[np.ndarray],
    device: torch.device,
    runtime: Runtime,
) -> list[float]:
    """Seconds of a network with each of ``widths`` in a runtime: medians over rounds of all of them."""
    watch, threads = Stopwatch(device, runtime), torch.get_num_threads()
    with torch.inference_mode(False), torch.no_grad():
        networks = [compact(model, make_plan(found.graph, kept)).eval() for kept in widths]
        runs = [prepare(network, *example, runtime, threads) for network in networks]
        times: list[list[float]] = []
        while len(times) < ROUNDS or (len(times) < MOST_ROUNDS and sum(map(sum, times)) < SHORTEST_NETWORKS):
            times.append([watch.seconds(run) for run in runs])
    full = statistics.median(row[0] for row in times)
    # A slow phase of the machine affects all networks of a round alike.
    pace = np.array([row[0] / full for row in times])
    medians: list[float] = np.median(np.array(times) / pace[:, None], axis=0).tolist()
    return medians
