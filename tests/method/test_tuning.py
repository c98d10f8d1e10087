"""Rates are chosen by the rule that the module states, on seeds that the study does not use."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.method import lines, runs, tuning_tables
from benchmarks.method.arms import ARMS, VARIANTS
from benchmarks.method.sets import RATES
from benchmarks.method.tuning import FURTHER, SEEDS, TUNED, best, found, screening, tuning

COMMITTED = Path(runs.__file__).parents[1] / "results" / "method-tuning.jsonl"


class Known:
    """A study whose trainings have the Dice that a function of their rate and seed gives."""

    def __init__(self, dice):
        self.dice, self.records = dice, {}

    def execute(self, run):
        self.records[run] = {"dice": self.dice(run)}

    def done(self, run):
        return self.records.get(run)


def executed(study, sets=("a", "b")):
    order = []
    for run in tuning(study, sets, ["dense"]):
        study.execute(run)
        order.append((run.set, run.lr, run.seed))
    return order


def test_all_rates_run_with_the_first_seed_and_the_best_two_with_the_second():
    order = executed(Known(lambda run: -abs(run.lr - 0.003) - 0.1 * (run.seed == SEEDS[1])))
    assert {one for one in order if one[2] == SEEDS[0]} == {
        (name, lr, SEEDS[0]) for name in "ab" for lr in (0.001, 0.002, 0.004, 0.008)
    }
    assert {one for one in order if one[2] == SEEDS[1]} == {
        (name, lr, SEEDS[1]) for name in "ab" for lr in (0.002, 0.004)
    }


def test_a_still_higher_rate_runs_only_where_the_highest_is_the_best():
    study = Known(lambda run: run.lr if run.set == "a" else -run.lr)
    order = executed(study)
    assert {lr for name, lr, _ in order if name == "a"} == {0.001, 0.002, 0.004, 0.008, 0.016}
    assert {lr for name, lr, _ in order if name == "b"} == {0.001, 0.002, 0.004, 0.008}
    assert best(study, "dense", "a") == 0.016 and best(study, "dense", "b") == 0.001


def test_a_network_is_tuned_at_its_own_budget_with_its_own_arms():
    study = Known(lambda run: -run.lr)
    runs_of = []
    for run in tuning(study, ["a"], model="mobilenetv3"):
        study.execute(run)
        runs_of.append(run)
    assert {(run.model, run.keep) for run in runs_of} == {("mobilenetv3", 0.5)}
    assert {run.arm for run in runs_of} == set(TUNED["mobilenetv3"].arms)
    assert best(study, "x0.5", "a", "mobilenetv3") == 0.001 and best(study, "x0.5", "a") is None


def test_close_rates_of_the_narrow_network_get_further_seeds():
    def order(gap, arm):
        study, found = Known(lambda run: gap * (run.lr == 0.004) - 0.1 * (run.lr in (0.001, 0.008))), []
        for run in tuning(study, ["a"], [arm]):
            study.execute(run)
            found.append((run.lr, run.seed))
        return [one for one in found if one[1] in FURTHER]

    assert order(0.005, "narrow") == [(lr, seed) for lr in (0.004, 0.002) for seed in FURTHER]
    assert order(0.02, "narrow") == order(0.005, "dense") == []


def test_the_best_rate_has_the_best_mean_of_all_seeds():
    # 0.004 is the best with the first seed, 0.002 on the mean of both.
    dice = {(0.004, 100): 0.9, (0.002, 100): 0.8, (0.004, 101): 0.1, (0.002, 101): 0.7}
    study = Known(lambda run: dice.get((run.lr, run.seed), 0.0))
    executed(study)
    assert best(study, "dense", "a") == 0.002
    assert found(study, "dense", "a", 0.001) == {100: 0.0}
    assert best(Known(dice.get), "dense", "a") is None


def test_the_seeds_are_none_of_the_study_and_variants_differ_from_the_default():
    assert not {*SEEDS, *FURTHER} & set(runs.SEEDS)
    assert len({arm.recipe() for arm in (ARMS["default"], *VARIANTS.values())}) == 1 + len(VARIANTS)
    assert not set(VARIANTS) & set(ARMS)
    assert {run.seed for run in screening(["a"])} == {*SEEDS, *FURTHER}


class Committed:
    """The committed lines of the tuning."""

    records = lines.read(COMMITTED)

    def done(self, run):
        wanted = run.key(runs.MODELS[run.model])
        wanted["training"]["lr"] = run.rate()
        return runs.find(self.records, wanted)


@pytest.mark.parametrize(
    "model, arm",
    [(model, arm) for model, rates in RATES.items() for arm in rates if (model, arm) != ("unet", "default")],
)
def test_the_rates_of_the_study_are_the_best_of_the_committed_lines(model, arm):
    rates = RATES[model][arm]
    assert {name: best(Committed(), arm, name, model) for name in rates} == rates


def test_no_rate_is_much_better_for_the_default_than_those_of_the_dense_network():
    rates = RATES["unet"]["default"]
    assert rates == RATES["unet"]["dense"]
    for name, lr in rates.items():
        highest, own = (
            statistics.fmean(found(Committed(), "default", name, one).values())
            for one in (best(Committed(), "default", name), lr)
        )
        assert highest - own < 0.001


def test_the_tables_have_the_numbers_of_the_lines():
    text = tuning_tables.report(lines.read(COMMITTED))
    chosen = [
        (model, arm, name, lr)
        for model, rates in RATES.items()
        for arm, own in rates.items()
        for name, lr in own.items()
    ]
    for wanted in chosen:
        own = [
            record["dice"]
            for record in lines.read(COMMITTED)
            if (record["model"], record["arm"], record["set"], record["training"]["lr"]) == wanted
        ]
        assert f"**{sum(own) / len(own):.4f}** ({len(own)})" in text
    assert tuning_tables.report([]) == ""
