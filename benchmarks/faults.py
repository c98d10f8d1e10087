"""Runs killed at random moments: ``python -m benchmarks.faults --kills 50``.

A small training with shrinking and frequent checkpoints is killed with SIGKILL, started again, killed again,
until it ends. Then its whole state (parameters, buffers, state of optimizer, scheduler and Pruner, random
numbers) is compared bit for bit with an undisturbed run. Kill times are uniform over the duration of a whole
run; every fourth kill also waits for a save and strikes within it. With several processes, all of them are
killed. A kill counts as survived if its run ended bit-identical.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.faults_training import Job, Phase, Watch, train

RESULTS = Path(__file__).parent / "results"
PATIENCE = 300.0  # time limit of a process in seconds
AIMED = 4  # one of so many kills is aimed at a save

# Processes are forked from one that has imported torch: a start costs milliseconds, not seconds.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = [
    "benchmarks.faults_training",
    "benchmarks.environment",
    "rich.table",
    "typer",
    "torch._dynamo",
    "torch.export._trace",
    "torch.distributed",
]


@dataclass
class Outcome:
    """The result of one campaign.

    Attributes:
        phases: kills by what the first process was doing.
        left_files: incomplete files that interrupted saves left beside the checkpoint.
        run_seconds: of an undisturbed run. seconds: of the campaign.
    """

    processes: int
    runs: int = 0
    identical_runs: int = 0
    kills: int = 0
    survived: int = 0
    restarts: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    left_files: int = 0
    run_seconds: float = 0.0
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


class Start:
    """The processes of a run, from their start or restart to their end or death."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._watches = [CONTEXT.RawValue(Watch) for _ in range(job.processes)]
        meeting = tempfile.mktemp(dir=job.folder, prefix="meeting-")
        self._processes: list[BaseProcess] = [
            CONTEXT.Process(target=train, args=(job, rank, meeting, watch))
            for rank, watch in enumerate(self._watches)
        ]
        for process in self._processes:
            process.start()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    @property
    def phase(self) -> Phase:
        return Phase(self._watches[0].phase)

    @property
    def save_seconds(self) -> float:
        return float(self._watches[0].save_seconds)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended, at most until the time given."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))

    def wait_for_save(self, seconds: float) -> None:
        """Wait until the first process saves or all have ended, at most until the time given."""
        end = time.monotonic() + seconds
        while self.phase != Phase.SAVE and self.alive and time.monotonic() < end:
            time.sleep(0.0002)

    def kill(self) -> Phase:
        """Send SIGKILL to all; returns the phase of the first process."""
        for process in self._processes:
            process.kill()
        self.wait(PATIENCE)
        return self.phase

    def check_end(self) -> None:
        """Raises RuntimeError unless all ended by themselves, without an error."""
        codes = [process.exitcode for process in self._processes]
        if any(codes):
            raise RuntimeError(f"a run ended with exit codes {codes}, expected zeros")


class Campaign:
    """Kills runs of one kind and compares their final states."""

    def __init__(self, folder: Path, processes: int, *, steps: int, every: int, seed: int) -> None:
        self._folder, self._steps, self._every, self._seed = folder, steps, every, seed
        self._random = random.Random(seed)
        self._save_seconds = 0.0
        self.outcome = Outcome(processes)

    def run(self, kills: int, seconds: float) -> Outcome:
        """Make runs until ``kills`` have struck or the time is over, and the last run has ended."""
        begin = time.monotonic()
        reference = self._undisturbed("reference")
        if found := differences(reference, self._undisturbed("again")):
            raise RuntimeError(
                f"two undisturbed runs differ in {found[:3]}: there is nothing to compare with"
            )
        while self.outcome.kills < kills and time.monotonic() - begin < seconds:
            self._disturbed(kills, reference)
        self.outcome.seconds = time.monotonic() - begin
        return self.outcome

    def _job(self, name: str) -> Job:
        folder = self._folder / f"{self.outcome.processes}-{name}"
        folder.mkdir(parents=True)
        return Job(folder, self.outcome.processes, self._steps, self._every, self._seed)

    def _undisturbed(self, name: str) -> list[Any]:
        job, begin = self._job(name), time.monotonic()
        start = Start(job)
        start.wait(PATIENCE)
        start.check_end()
        self.outcome.run_seconds = time.monotonic() - begin
        self._save_seconds = start.save_seconds
        return ends(job)

    def _disturbed(self, kills: int, reference: list[Any]) -> None:
        """One run, killed and restarted until it ends."""
        job, outcome, hit = self._job(f"run{self.outcome.runs}"), self.outcome, 0
        start = Start(job)
        while outcome.kills + hit < kills and self._strike(start, aimed=(outcome.kills + hit) % AIMED == 0):
            hit += 1
            start = Start(job)
        start.wait(PATIENCE)
        start.check_end()
        found = differences(reference, ends(job))
        outcome.runs += 1
        outcome.kills += hit
        outcome.restarts += hit
        outcome.left_files += len(list(job.folder.glob(".*")))
        if found:
            outcome.differences += [f"run {outcome.runs}: {place}" for place in found]
        else:
            outcome.identical_runs += 1
            outcome.survived += hit
        shutil.rmtree(job.folder)

    def _strike(self, start: Start, *, aimed: bool) -> bool:
        """Kill at a random moment; False if the run ended before."""
        start.wait(self._random.uniform(0, self.outcome.run_seconds))
        if aimed:
            start.wait_for_save(PATIENCE)
            time.sleep(self._random.uniform(0, self._save_seconds))
        if not start.alive:
            return False
        self.outcome.phases[start.kill().name.lower()] += 1
        return True


def ends(job: Job) -> list[Any]:
    """The final state of each process of a run."""
    return [torch.load(job.end(rank), weights_only=True) for rank in range(job.processes)]


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """The places where two states differ in a bit, a type or a key."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        same = same and torch.equal(_bytes(left), _bytes(right))
        return [] if same else [place]
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{place} (keys)"]
        return [d for key in left for d in differences(left[key], right[key], f"{place}/{key}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{place} (length)"]
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (one, other) in pairs for d in differences(one, other, f"{place}/{i}")]
    return [] if type(left) is type(right) and left == right else [place]


def _bytes(tensor: Tensor) -> Tensor:
    # By bytes, so that NaN equals NaN and 0 does not equal -0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def table(outcomes: list[Outcome]) -> Table:
    """One line per campaign."""
    columns = ("processes", "kills", "starting", "training", "saving", "ending", "restarts", "runs")
    result = Table(*columns, "identical", "kills survived", "left files", "seconds")
    for o in outcomes:
        phases = [str(o.phases[phase.name.lower()]) for phase in Phase]
        counts = (o.restarts, o.runs, o.identical_runs, f"{o.survived} of {o.kills}", o.left_files)
        result.add_row(str(o.processes), str(o.kills), *phases, *map(str, counts), f"{o.seconds:.0f}")
    return result


def main(
    kills: Annotated[int, typer.Option(help="Kills per number of processes.")] = 50,
    processes: Annotated[list[int], typer.Option(help="Processes of a run; may be repeated.")] = [1, 2],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 24,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 2,
    seconds: Annotated[float, typer.Option(help="No further run begins after these.")] = float("inf"),
    seed: Annotated[int, typer.Option(help="Of the training and of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Where faults.txt and faults.json go.")] = RESULTS,
) -> None:
    """Print and write the table; exit code 1 if a run ended otherwise than the undisturbed one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CONTEXT.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        campaigns = [Campaign(Path(folder), n, steps=steps, every=every, seed=seed) for n in processes]
        outcomes = [campaign.run(kills, seconds) for campaign in campaigns]
    where = environment()
    with open(out / "faults.txt", "w") as file:
        for console in (Console(), Console(file=file, width=140)):
            console.print(table(outcomes))
            console.print(where)
    settings = {"steps": steps, "every": every, "seed": seed}
    record = {"environment": where, "settings": settings, "outcomes": [vars(o) for o in outcomes]}
    (out / "faults.json").write_text(json.dumps(record, indent=2) + "\n")
    raise typer.Exit(any(o.differences for o in outcomes))


if __name__ == "__main__":
    typer.run(main)
