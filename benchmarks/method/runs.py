"""The trainings of the study, their order, and their lines of results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.method import lines
from benchmarks.method.arms import ARMS, arm_of
from benchmarks.method.sets import LR_WARMUP, MOBILENET, RATES, UNET, Set
from benchmarks.method.training import figures, train
from sparsekern.recipes.settings import Settings

MODELS: Mapping[str, Settings] = {"unet": UNET, "mobilenetv3": MOBILENET}
SEEDS = range(6)

CONTROLS = ("shuffled", "random", "fresh", "taylor")
PARTS = ("balance", "count", "magnitude", "activation", "redundancy", "uniform", "flat")
TIMED = ("default-time", "narrow-time", "narrow-long", "dense-time")
CURVE = ("narrow", "default", "fresh", "shuffled", "random", "taylor")
MULTIPLIERS = ("dense", "default", "x0.75", "x0.5", "x0.35", "balance")


@dataclass(frozen=True)
class Stage:
    """Trainings of one network at one budget: all sets and arms of a seed come before the next seed.

    Attributes:
        model: of `MODELS`. keep: share of the MACs. arms: of `ARMS`.
        sets: of the sets there are, those that are used; None for all.
    """

    model: str
    keep: float
    arms: Sequence[str]
    sets: Sequence[str] | None = None


# First the arms for the main claim, then those that measure the value of each part, then the rest.
STAGES = (
    Stage("unet", 0.1, ("dense", "narrow", "default")),
    Stage("unet", 0.2, CURVE[:2]),
    Stage("unet", 0.1, CONTROLS),
    # Its output has an eighth of the resolution, too coarse for vessels and membranes.
    Stage("mobilenetv3", 0.5, MULTIPLIERS[:4], ("dsb2018", "scenes")),
    Stage("unet", 0.1, TIMED),
    Stage("unet", 0.05, CURVE[:2]),
    Stage("unet", 0.5, CURVE[:2]),
    Stage("unet", 0.1, PARTS),
    Stage("mobilenetv3", 0.5, MULTIPLIERS[4:], ("dsb2018", "scenes")),
    Stage("unet", 0.2, CURVE[2:] + TIMED),
    Stage("unet", 0.05, CURVE[2:]),
    Stage("unet", 0.5, CURVE[2:]),
)


@dataclass(frozen=True)
class Run:
    """One training, by names."""

    model: str
    keep: float
    seed: int
    arm: str
    set: str
    lr: float | None = None  # learning rate; None for the one chosen for arm and set

    def rate(self) -> float:
        """The learning rate."""
        tuned = RATES[self.model].get(arm_of(self.arm).rate_of, {}).get(self.set)
        return self.lr or tuned or MODELS[self.model].lr

    def key(self, settings: Settings) -> dict[str, Any]:
        """The values that a stored line must have to count as this training."""
        arm = arm_of(self.arm)
        return {
            "model": self.model,
            # A network that no budget touches is trained once.
            "keep": self.keep if arm.sized else None,
            "seed": self.seed,
            "arm": self.arm,
            "set": self.set,
            "recipe": arm.recipe(),
            "training": {
                name: getattr(settings, name)
                for name in ("width", "depth", "steps", "batch", "crop", "lr", "weight_decay")
            }
            | {"warmup": LR_WARMUP},
        }


def queue(
    sets: Sequence[str], stages: Sequence[Stage] = STAGES, seeds: Sequence[int] = SEEDS
) -> Iterator[Run]:
    """All trainings, the most telling first."""
    for stage in stages:
        for seed in seeds:
            for arm in stage.arms:
                for name in sets if stage.sets is None else [one for one in sets if one in stage.sets]:
                    yield Run(stage.model, stage.keep, seed, arm, name)


def find(records: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The last line that has all of `key`."""
    return next((record for record in reversed(records) if key.items() <= record.items()), None)


def current(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines that the study would not run again, by the settings of now."""
    found = []
    for record in records:
        if record["arm"] in ARMS and record["model"] in MODELS:
            run = Run(*(record[name] for name in ("model", "keep", "seed", "arm", "set")))
            settings = replace(MODELS[run.model], lr=run.rate())
            if run.key(settings).items() <= record.items():
                found.append(record)
    return found


class Study:
    """Runs the trainings that are not yet in a file of results, and adds their lines.

    Args:
        path: the file.
        sets: the images by name.
        environment: machine, versions and commit, written to each line.
    """

    def __init__(self, path: Path, sets: Mapping[str, Set], environment: Mapping[str, Any]) -> None:
        self.path, self.sets, self.environment = path, sets, environment
        self.records = lines.read(path)

    def settings(self, run: Run) -> Settings:
        return replace(self.sets[run.set].settings(MODELS[run.model]), lr=run.rate())

    def done(self, run: Run) -> Mapping[str, Any] | None:
        return find(self.records, run.key(self.settings(run)))

    def execute(self, run: Run) -> dict[str, Any]:
        """Train, score, and add the line."""
        settings, arm, data = self.settings(run), arm_of(run.arm), self.sets[run.set]
        default = None
        if arm.widths == "default":
            default = self.execute_if_new(Run(run.model, run.keep, run.seed, "default", run.set))["widths"]
        steps = settings.steps if arm.time_of is None else self._steps_of_equal_time(run)
        load = os.getloadavg()[0]
        outcome = train(arm, data, settings, run.keep, run.seed, steps=steps, default=default)
        record = (
            run.key(settings)
            | {"steps": steps}
            | figures(outcome, data, settings)
            | {"load": [round(load, 2), round(os.getloadavg()[0], 2)]}
            | dict(self.environment)
        )
        lines.append(self.path, record)
        self.records.append(record)
        return record

    def execute_if_new(self, run: Run) -> Mapping[str, Any]:
        return self.done(run) or self.execute(run)

    def _steps_of_equal_time(self, run: Run) -> int:
        """The number of steps of an arm that takes as long as the training of its reference arm.

        By processor time of the loop, medians over the seeds that are there: on one machine, with one thread,
        other programs change it less than wall time.
        """
        arm = arm_of(run.arm)
        assert arm.time_of is not None
        plain = "default" if arm.pruned else {"uniform": "narrow", "dense": "dense"}[arm.widths]
        for name in (arm.time_of, plain):
            self.execute_if_new(Run(run.model, run.keep, run.seed, name, run.set))
        theirs, own = (self._processor_seconds(run, name) for name in (arm.time_of, plain))
        return max(1, round(self.settings(run).steps * theirs / own))

    def _processor_seconds(self, run: Run, arm: str) -> float:
        found = (self.done(Run(run.model, run.keep, seed, arm, run.set)) for seed in SEEDS)
        return statistics.median(record["processor_seconds"] for record in found if record is not None)
