from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsekern.bench import compare


def spread(median: float, noise: float = 0.01) -> dict[str, float]:
    low, high = median * (1 - noise), median * (1 + noise)
    return {"median": median, "q1": median, "q3": median, "p10": low, "p90": high}


def report(cases: dict[str, tuple[float, float]], *, noise: float = 0.01, **where: Any) -> dict[str, Any]:
    """Seconds of ours and of torch's by case; torch 0 for a case that is compared with nothing."""
    rows = []
    for name, (ours, theirs) in cases.items():
        over = {"torch fused": spread(ours / theirs, noise)} if theirs else {}
        seconds = {"sparsekern": spread(ours, noise)}
        rows.append({"name": name, "status": "timed", "seconds": seconds, "over": over})
    rows.append({"name": "broken", "status": "wrong", "seconds": {}, "over": {}})
    return {"format": 1, "environment": {"machine": "M", "threads": 1} | where, "cases": rows}


def test_changes_are_those_of_the_ratio_beside_torch() -> None:
    old = report(
        {"slower": (1e-3, 1e-3), "machine": (1e-3, 1e-3), "faster": (1e-3, 1e-3), "gone": (1.0, 1.0)}
    )
    new = report(
        {"slower": (1.2e-3, 1e-3), "machine": (3e-3, 3e-3), "faster": (0.5e-3, 1e-3), "new": (1.0, 1.0)}
    )
    found = {change.name: change for change in compare.changes(new, old)}
    assert list(found) == ["slower", "machine", "faster"]
    assert found["slower"].ratio == pytest.approx(1.2) and found["slower"].regressed
    assert (found["slower"].old, found["slower"].new) == pytest.approx((1.0, 1.2))
    assert found["machine"].ratio == pytest.approx(1.0) and found["machine"].noisy
    assert found["faster"].improved and not found["faster"].regressed
    assert found["slower"].beside == "torch fused"


def test_what_is_within_the_noise_is_no_regression() -> None:
    old, new = ({"case": (1e-3, 1e-3)}, {"case": (1.2e-3, 1e-3)})
    assert compare.changes(report(new), report(old))[0].regressed
    assert compare.changes(report(new, noise=0.15), report(old, noise=0.15))[0].noisy
    little = report({"case": (1.09e-3, 1e-3)}, noise=0.001)
    assert compare.changes(little, report(old, noise=0.001))[0].noisy


def test_a_case_beside_nothing_is_compared_by_its_time() -> None:
    change = compare.changes(report({"case": (2e-3, 0.0)}), report({"case": (1e-3, 0.0)}))[0]
    assert change.beside == "" and change.ratio == pytest.approx(2.0) and change.regressed


def test_other_machines_and_settings_are_named() -> None:
    assert compare.elsewhere(report({}, threads=1), report({}, threads=2)) == ["threads 2, now 1"]
    assert compare.elsewhere(report({}), report({})) == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format": 2}', '{"format": 1}', '{"format": 1, "cases": [{}], "environment": {}}'],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"--compare: {file} is no report, expected a file that"):
        compare.read(file)
    with pytest.raises(FileNotFoundError, match="--compare: cannot read .*missing.json: No such file"):
        compare.read(tmp_path / "missing.json")


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    content = report({"case": (1e-3, 1e-3)})
    file.write_text(json.dumps(content))
    assert compare.read(file) == content
