"""Running cases: each one is checked, then timed; a wrong one is reported as wrong and never timed.

Where tensors happen to lie in memory changes what a pass over them takes by a tenth, for as long as they lie
there. So the tensors of a case are allocated several times, at other places, and the noise that is shown
covers that.
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
from sparsekern.bench.comparison import OURS, Contest
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
    """What became of a case; seconds and bytes are those of one call.

    Attributes:
        status: ``timed``, ``wrong`` (its result differs from the reference's; never timed) or ``absent`` (its
            backend does not work here).
        reason: what is wrong or why it is absent.
        elements: of all parameters; 0 where the case is absent.
        seconds: per side.
        moved: bytes per side that have to be moved at least; empty where memory is not the limit.
        gb_per_s: per side, ``1e-9 * moved / median seconds``.
        share_of_stream: of our side, its bytes a second over those of the stream in the same rounds.
        over: our seconds over another side's, in the same rounds.
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
        """As JSON has it."""
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
    """All results of a run, where and how they were made."""

    environment: dict[str, Any]
    placements: int
    rounds: int
    results: list[Result] = field(default_factory=list)
    stream_gb_per_s: dict[str, Spread] = field(default_factory=dict)
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
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
    """Runs cases one by one, with a stream of memory beside each.

    Args:
        placements: how often the tensors of a case are allocated anew; once, with as many rounds in all, if
            memory is not the limit.
        rounds: with each of them, in each of which every side of a case is timed once.
        shortest: seconds that one measurement takes at least, by repeating the call.
        elements: of each array of the stream.
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
        """The report on ``cases``; ``on_case`` is called before each."""
        begin = perf_counter()
        # What was imported is no garbage, and would be looked through after every case.
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
        """Check a case, and time it if it is right."""
        missing = backends.why_not(case.backend, case.device)
        if missing is not None:
            return Result(case, ABSENT, missing)
        with forced(case.backend):
            contest = build(case)
            reason = _wrong(contest)
            if reason is not None:
                return Result(case, WRONG, reason, contest.elements)
            return self._timed(case, contest)

    def _timed(self, case: Case, contest: Contest) -> Result:
        if not contest.moved:
            return self._result(case, contest, self._race(case, contest, self._placements * self._rounds))
        times = self._race(case, contest, self._rounds)
        for _ in range(self._placements - 1):
            # What lies between makes the next tensors lie elsewhere.
            between = torch.empty(int(self._random.integers(2**10, 2**20)))
            contest = build(case)
            for name, more in self._race(case, contest, self._rounds).items():
                times[name] += more
            del between
        return self._result(case, contest, times)

    def _race(self, case: Case, contest: Contest, rounds: int) -> dict[str, list[float]]:
        """Seconds by side, and of a stream beside them where memory is the limit."""
        sides, device = dict(contest.sides), torch.device(case.device)
        if contest.moved:
            sides[_STREAM] = Stream(device, self._elements)
        return interleaved(sides, rounds, device, shortest=self._shortest)

    def _result(self, case: Case, contest: Contest, times: Mapping[str, list[float]]) -> Result:
        moved = contest.moved
        result = Result(case, TIMED, elements=contest.elements, moved=moved)
        result.seconds = {name: Spread.of(times[name]) for name in contest.sides}
        others = [name for name in contest.sides if name != OURS]
        result.over = {name: Spread.of(ratios(times[OURS], times[name])) for name in others}
        if moved:
            result.gb_per_s = {name: 1e-9 * moved[name] / result.seconds[name].median for name in moved}
            rates = [4e-9 * ACCESSES * self._elements / seconds for seconds in times[_STREAM]]
            mine = [1e-9 * moved[OURS] / seconds for seconds in times[OURS]]
            result.share_of_stream = Spread.of(ratios(mine, rates))
            self._rates.setdefault(case.device, []).extend(rates)
        return result


def _wrong(contest: Contest) -> str | None:
    """How its result is wrong; an op that raises has none that is right."""
    try:
        return contest.wrong()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
