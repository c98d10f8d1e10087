"""Reading a report from a file and comparing two reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekern.bench.comparison import OURS
from sparsekern.bench.suite import FORMAT, TIMED
from sparsekern.files.atomic import parse_json

# Largest time ratio of one case between two runs of the same code that counts as noise. On a busy machine one
# case in twenty exceeds it (see benchmarks/results/bench-repeat.txt).
BETWEEN_RUNS = 1.1


@dataclass(frozen=True)
class Change:
    """One case in two reports.

    Attributes:
        name: name of the case.
        old, new: sparsekern's median time in the old and the new report, in milliseconds.
        beside: the candidate that both times are divided by; ``""`` if the reports share none.
        ratio: new over old relative time. A relative time is sparsekern's time over that of ``beside``, so
            the speed of the machine cancels out.
        noisy: whether the change is within the noise: the ranges from the 10th to the 90th percentile
            overlap, or the ratio is as near to 1 as between two runs of the same code.
    """

    name: str
    old: float
    new: float
    beside: str
    ratio: float
    noisy: bool

    @property
    def regressed(self) -> bool:
        """Slower beyond noise."""
        return self.ratio > 1 and not self.noisy

    @property
    def improved(self) -> bool:
        """Faster beyond noise."""
        return self.ratio < 1 and not self.noisy


def changes(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[Change]:
    """The changes of the cases timed in both reports (:meth:`Report.plain`), in the new report's order."""
    before = {case["name"]: case for case in old["cases"] if case["status"] == TIMED}
    now = [case for case in new["cases"] if case["status"] == TIMED and case["name"] in before]
    return [_change(case, before[case["name"]]) for case in now]


def elsewhere(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """The differences between the environments of two reports, such as ``threads 2, now 1``."""
    pairs = ((key, old["environment"].get(key), new["environment"].get(key)) for key in new["environment"])
    return [f"{key} {then}, now {now}" for key, then, now in pairs if then != now]


def _change(new: Mapping[str, Any], old: Mapping[str, Any]) -> Change:
    beside = next((name for name in new["over"] if name in old["over"]), "")
    mine, theirs = (case["over"][beside] if beside else case["seconds"][OURS] for case in (new, old))
    ratio = mine["median"] / theirs["median"]
    apart = mine["p10"] > theirs["p90"] or mine["p90"] < theirs["p10"]
    noisy = not apart or 1 / BETWEEN_RUNS <= ratio <= BETWEEN_RUNS
    old_ms, new_ms = (1e3 * case["seconds"][OURS]["median"] for case in (old, new))
    return Change(new["name"], old_ms, new_ms, beside, ratio, noisy)


def read(path: Path) -> dict[str, Any]:
    """A report from a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a report of this format; the error names ``--compare``.
    """
    expected = f"--compare: {path} is no report, expected a file that sparsekern bench --json has written"
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise type(error)(f"--compare: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(expected)
    try:
        changes(content, content)
        elsewhere(content, content)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{expected} ({type(error).__name__}: {error})") from None
    return content
