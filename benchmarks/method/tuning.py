"""Learning rates and variants of the default, tried on seeds that the study does not use."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.method.arms import VARIANTS
from benchmarks.method.runs import Run


class Done(Protocol):
    """What is known of trainings; a `Study` is one."""

    def done(self, run: Run) -> Mapping[str, Any] | None: ...


# None of the study's: choices must not be made by the results that are then reported.
SEEDS = (100, 101)
HIGHEST = 0.016  # tried where the next lower one is the best of the others
RATES = (0.002, 0.004, 0.008, 0.001, HIGHEST)
FINALISTS = 2  # rates that get a second seed
TIE = 0.01  # Dice between the best two rates, below which they get further seeds
FURTHER = (102, 103)
SCREENED = ("default", *VARIANTS)


@dataclass(frozen=True)
class Tuned:
    """What is tuned of a network.

    Attributes:
        keep: share of the MACs of the trainings.
        arms: those with rates of their own.
        doubted: of them, those with further seeds: the claims are about being better than they.
    """

    keep: float
    arms: tuple[str, ...]
    doubted: tuple[str, ...]


TUNED: Mapping[str, Tuned] = {
    "unet": Tuned(0.1, ("dense", "default", "narrow"), ("narrow",)),
    "mobilenetv3": Tuned(0.5, ("dense", "default", "x0.5"), ("dense", "x0.5")),
}


def tuning(
    study: Done, sets: Sequence[str], arms: Sequence[str] | None = None, model: str = "unet"
) -> Iterator[Run]:
    """Trainings that choose rates: with the first seed all rates, then with the other seeds the best ones.

    What comes next depends on the runs before, which have been executed by then.
    """
    tuned, (first, *others) = TUNED[model], SEEDS
    for arm in tuned.arms if arms is None else arms:
        for lr in RATES:
            for name in sets:
                if lr != HIGHEST or _ranked(study, arm, name, model)[0] == max(RATES[:-1]):
                    yield Run(model, tuned.keep, first, arm, name, lr)
        for name in sets:
            finalists = _ranked(study, arm, name, model)[:FINALISTS]
            for lr in finalists:
                for seed in others:
                    yield Run(model, tuned.keep, seed, arm, name, lr)
            means = [statistics.fmean(found(study, arm, name, lr, model).values()) for lr in finalists]
            if arm in tuned.doubted and max(means) - min(means) < TIE:
                for lr in finalists:
                    for seed in FURTHER:
                        yield Run(model, tuned.keep, seed, arm, name, lr)


def _ranked(study: Done, arm: str, name: str, model: str) -> list[float]:
    """The rates that have run with the first seed, the best first."""
    dice = {lr: found(study, arm, name, lr, model).get(SEEDS[0]) for lr in RATES}
    return sorted((lr for lr in RATES if dice[lr] is not None), key=lambda lr: -(dice[lr] or 0.0))


def screening(
    sets: Sequence[str], arms: Sequence[str] = SCREENED, seeds: Sequence[int] = (*SEEDS, *FURTHER)
) -> Iterator[Run]:
    """Trainings of the default UNet and its variants, with the seeds of the tuning and the chosen rates."""
    for seed in seeds:
        for arm in arms:
            for name in sets:
                yield Run("unet", TUNED["unet"].keep, seed, arm, name)


def found(study: Done, arm: str, name: str, lr: float, model: str = "unet") -> dict[int, float]:
    """Dice by seed of the trainings at one rate that are there."""
    seeds = (*SEEDS, *FURTHER)
    keep = TUNED[model].keep
    records = {seed: study.done(Run(model, keep, seed, arm, name, lr)) for seed in seeds}
    return {seed: record["dice"] for seed, record in records.items() if record is not None}


def best(study: Done, arm: str, name: str, model: str = "unet") -> float | None:
    """The rate with the best mean Dice, of those that have run with most seeds; None if there is none."""
    complete = {lr: list(found(study, arm, name, lr, model).values()) for lr in RATES}
    most = max(map(len, complete.values()))
    means = {lr: statistics.fmean(values) for lr, values in complete.items() if len(values) == most > 1}
    return max(means, key=lambda lr: means[lr]) if means else None
