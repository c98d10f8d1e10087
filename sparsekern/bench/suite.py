"""Running benchmark cases: each case is validated, then timed; a case with a wrong result is never timed.

The addresses of tensors change the time of a pass over them by up to 10 %. The tensors of a case are
therefore allocated several times at different addresses, and the reported noise includes this effect.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

from sparsekern.bench.cases import Case
from sparsekern.bench.check import forced
from sparsekern.bench.comparison import OURS, Comparison
from sparsekern.bench.comparisons import build
from sparsekern.bench.environment import environment, kept_memory
from sparsekern.bench.stream import ACCESSES, ELEMENTS, Stream
from sparsekern.bench.timing import SHORTEST, Spread, interleaved, ratios
from sparsekern.kernels import backends

FORMAT = 1
TIMED, WRONG, ABSENT = "timed", "wrong", "absent"
_STREAM = "stream"


@dataclass
class Result:
    """The result of a case; seconds and bytes refer to one call.

    Attributes:
        case: the case.
        status: ``timed``, ``wrong`` (the result differs from the reference; never timed) or ``absent`` (the
            backend does not work here).
        reason: the error in the result, or the reason for the absence.
        elements: number of elements of all parameters; 0 for an absent case.
        seconds: seconds of each candidate.
        moved: the least bytes that each candidate must move; empty where memory is not the limit.
        gb_per_s: ``1e-9 * moved / median seconds`` of each candidate.
        share_of_stream: sparsekern's bytes per second over those of the stream in the same rounds.
        over: sparsekern's seconds over those of each other candidate in the same rounds.
    """

    case: Case
    status: str
    reason: str | None = None
    elements: int = 0
    seconds: dict[str, Spread] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    gb_per_s: dict[str, float] = field(default_factory=dict)
    share_of_stream: Spread | None = None
    over: dict[str, Spread] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        case = {
            "name": str(self.case),
            "op": self.case.op,
            "backend": self.case.backend,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "tensors": self.case.tensors,
            "masked": self.case.masked,
        }
        return case | {key: value for key, value in asdict(self).items() if key != "case"}


@dataclass
class Report:
    """All results of a run.

    Attributes:
        environment: machine, versions and settings, see :func:`environment`.
        placements, rounds: see :class:`Suite`.
        results: one result per case.
        stream_gb_per_s: bandwidth of the stream, by device type.
        seconds: duration of the run.
    """

    environment: dict[str, Any]
    placements: int
    rounds: int
    results: list[Result] = field(default_factory=list)
    stream_gb_per_s: dict[str, Spread] = field(default_factory=dict)
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        streams = {device: asdict(spread) for device, spread in self.stream_gb_per_s.items()}
        return {
            "format": FORMAT,
            "environment": self.environment,
            "placements": self.placements,
            "rounds": self.rounds,
            "seconds": round(self.seconds, 1),
            "stream_gb_per_s": streams,
            "cases": [result.plain() for result in self.results],
        }


class Suite:
    """Runs cases one by one and times a memory stream beside each.

    Args:
        placements: number of allocations of a case's tensors. A case that memory does not limit is allocated
            once and timed in ``placements * rounds`` rounds.
        rounds: timed rounds per allocation; each round times every candidate once.
        shortest: least seconds of one measurement, reached by repeated calls.
        elements: elements of each array of the stream.
    """

    def __init__(
        self, placements: int, rounds: int, *, shortest: float = SHORTEST, elements: int = ELEMENTS
    ) -> None:
        self._placements = placements
        self._rounds = rounds
        self._shortest = shortest
        self._elements = elements
        self._random = np.random.default_rng(0)
        self._rates: dict[str, list[float]] = {}

    def run(self, cases: Sequence[Case], on_case: Callable[[Case], None] = lambda case: None) -> Report:
        """Run ``cases`` and return the report; ``on_case`` is called before each case."""
        begin = perf_counter()
        # Imported objects are never garbage; without the freeze each collection would scan them.
        gc.freeze()
        with kept_memory() as freed_memory:
            where = environment() | {"freed_memory": freed_memory}
            report = Report(where, self._placements, self._rounds)
            for case in cases:
                on_case(case)
                report.results.append(self.result(case))
                gc.collect()
        gc.unfreeze()
        report.stream_gb_per_s = {device: Spread.of(rates) for device, rates in self._rates.items()}
        report.seconds = perf_counter() - begin
        return report

    def result(self, case: Case) -> Result:
        """Validate a case and time it if its result is right."""
        missing = backends.why_not(case.backend, case.device)
        if missing is not None:
            return Result(case, ABSENT, missing)
        with forced(case.backend):
            comparison = build(case)
            reason = _validate(comparison)
            if reason is not None:
                return Result(case, WRONG, reason, comparison.elements)
            return self._timed(case, comparison)

    def _timed(self, case: Case, comparison: Comparison) -> Result:
        if not comparison.moved:
            return self._result(
                case, comparison, self._time_in_turns(case, comparison, self._placements * self._rounds)
            )
        times = self._time_in_turns(case, comparison, self._rounds)
        for _ in range(self._placements - 1):
            # This block moves the next tensors to other addresses.
            between = torch.empty(int(self._random.integers(2**10, 2**20)))
            comparison = build(case)
            for name, more in self._time_in_turns(case, comparison, self._rounds).items():
                times[name] += more
            del between
        return self._result(case, comparison, times)

    def _time_in_turns(self, case: Case, comparison: Comparison, rounds: int) -> dict[str, list[float]]:
        """Seconds by candidate, and of a stream where memory is the limit."""
        candidates, device = dict(comparison.candidates), torch.device(case.device)
        if comparison.moved:
            candidates[_STREAM] = Stream(device, self._elements)
        return interleaved(candidates, rounds, device, shortest=self._shortest)

    def _result(self, case: Case, comparison: Comparison, times: Mapping[str, list[float]]) -> Result:
        moved = comparison.moved
        result = Result(case, TIMED, elements=comparison.elements, moved=moved)
        result.seconds = {name: Spread.of(times[name]) for name in comparison.candidates}
        others = [name for name in comparison.candidates if name != OURS]
        result.over = {name: Spread.of(ratios(times[OURS], times[name])) for name in others}
        if moved:
            result.gb_per_s = {name: 1e-9 * moved[name] / result.seconds[name].median for name in moved}
            rates = [4e-9 * ACCESSES * self._elements / seconds for seconds in times[_STREAM]]
            mine = [1e-9 * moved[OURS] / seconds for seconds in times[OURS]]
            result.share_of_stream = Spread.of(ratios(mine, rates))
            self._rates.setdefault(case.device, []).extend(rates)
        return result


def _validate(comparison: Comparison) -> str | None:
    """The error in the result, or None; an exception also counts as an error."""
    try:
        return comparison.validate()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
