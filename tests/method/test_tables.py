"""The tables of the study, from lines whose means and differences are known."""

from __future__ import annotations

import pytest

from benchmarks.method.tables import Table, report

TRAINING = {
    "width": 16,
    "depth": 4,
    "steps": 400,
    "batch": 4,
    "crop": 64,
    "lr": 2e-3,
    "weight_decay": 0.01,
    "warmup": 0.05,
}
PLACE = {"machine": "here", "torch": "2", "threads": 1, "commit": "abc"}


def line(arm, name, seed, dice, keep=0.1, recipe="now", training=TRAINING):
    return PLACE | {
        "model": "unet",
        "keep": None if arm == "dense" else keep,
        "arm": arm,
        "set": name,
        "seed": seed,
        "recipe": recipe,
        "training": training,
        "dice": dice,
        "averaged_dice": dice + 0.01,
        "parameters": 100 if arm == "dense" else 10,
        "macs": 1000 if arm == "dense" else 100,
        "activation_bytes": 500,
        "processor_seconds": 8.0 if arm == "dense" else 2.0,
        "steps": 400,
    }


@pytest.fixture
def lines():
    """Six seeds on two sets; over narrow, default is 0.02 (vessels) and 0.04 (scenes) better, dense 0.05."""
    found = []
    for seed in range(6):
        for name, gain in (("vessels", 0.02), ("scenes", 0.04)):
            base = 0.5 + 0.01 * seed
            found += [
                line("narrow", name, seed, base),
                line("default", name, seed, base + gain),
                line("dense", name, seed, base + 0.05),
            ]
    return found


def test_differences_are_paired_by_seed(lines):
    table = Table(lines, "unet", 0.1)
    assert table.paired("default", "narrow", "vessels") == pytest.approx(dict.fromkeys(range(6), 0.02))
    whole = [table.paired("default", "narrow", name) for name in table.sets]
    assert table.over_sets(whole) == pytest.approx([0.03] * 6)
    text = report(lines)
    assert "| narrow | +0.0200 [+0.0200, +0.0200] | +0.0400 [+0.0400, +0.0400] | " in text
    assert "| +0.0300 [+0.0300, +0.0300] p=0.03 |" in text
    assert "| dense | -0.0300 [-0.0300, -0.0300] | -0.0100 [-0.0100, -0.0100] | " in text
    # What a user asks first comes first.
    assert text.index("| narrow | +0.0200") < text.index("| dense | -0.0300")


def test_only_seeds_that_both_arms_have_count(lines):
    fewer = [r for r in lines if not (r["arm"] == "narrow" and r["set"] == "vessels" and r["seed"] in (1, 4))]
    table = Table(fewer, "unet", 0.1)
    assert sorted(table.paired("default", "narrow", "vessels")) == [0, 2, 3, 5]
    assert len(table.over_sets([table.paired("default", "narrow", name) for name in table.sets])) == 4
    assert "p=0.12 (4 seeds)" in report(fewer)


def test_arms_that_have_not_run_on_all_sets_are_left_out(lines):
    some = line("taylor", "vessels", 0, 0.5)
    assert report([*lines, some]) == report(lines)
    assert "| taylor |" in report([*lines, some, line("taylor", "scenes", 0, 0.5)])


def test_lines_of_an_older_default_are_left_out(lines):
    older = [line("default", "vessels", seed, 0.1, recipe="before") for seed in range(6)]
    assert report([*older, *lines]) == report(lines)


def test_lines_at_another_learning_rate_have_tables_of_their_own(lines):
    older = [line("narrow", "vessels", seed, 0.1) for seed in range(2)]
    text = report(lines, older=older, tuning="## Learning rates")
    _, _, rest = text.partition("## unet, keep=0.1, learning rate 0.002 for all arms and sets")
    assert "| narrow | all widths scaled alike to the same MACs, from scratch | 0.1000 (2) | 0.1000 |" in rest
    assert rest.endswith("## Learning rates\n")


def test_arms_of_equal_time_are_compared_with_each_other(lines):
    assert "equal processor time" not in report(lines)
    longer = [
        line("default-time", r["set"], r["seed"], r["dice"] + 0.01) for r in lines if r["arm"] == "dense"
    ]
    text = report([*lines, *longer])
    assert "| default-time minus dense | +0.0100 [+0.0100, +0.0100] | +0.0100 " in text
    assert "minus dense-time" not in text


def test_costs_are_shares_of_the_dense_training(lines):
    times = [
        {"model": "unet", "keep": 0.1, "arm": arm, "set": name, "latency": seconds}
        for name in ("vessels", "scenes")
        for arm, seconds in (("dense", 4.0), ("default", 1.0))
    ]
    text = report(lines, {"environment": PLACE, "times": times})
    assert "| default | 10.0% | 10.0% | 100.0% | 25.0% | 100.0% | 25.0% |" in text
    assert "| narrow | 10.0% | 10.0% | 100.0% | 25.0% | 100.0% |  |" in text


def test_the_curve_has_every_budget(lines):
    more = [line(r["arm"], r["set"], r["seed"], r["dice"], keep=0.2) for r in lines if r["arm"] == "narrow"]
    text = report([*lines, *more])
    assert "| minus dense, mean over sets | keep=0.2 | keep=0.1 |" in text
    assert "## unet, keep=0.2 of the MACs" in text
