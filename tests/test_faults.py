"""A small campaign of kills: the command unchanged, with three kills and one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_killed_runs_end_as_the_undisturbed_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "3", "--processes", "1", "--steps", "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (outcome,) = json.loads((tmp_path / "faults.json").read_text())["outcomes"]
    assert outcome["kills"] == outcome["survived"] == 3
    assert sum(outcome["phases"].values()) == 3
    assert outcome["runs"] == outcome["identical_runs"] >= 1
    assert "3 of 3" in (tmp_path / "faults.txt").read_text()
