"""A small study: arms are paired, finished runs are not repeated, and the report agrees with the lines."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from benchmarks.method import lines, runs, tables, training
from benchmarks.method.arms import ARMS
from benchmarks.method.runs import STAGES, Run, Stage, Study, current, find, queue
from benchmarks.method.sets import MOBILENET, UNET, Set
from benchmarks.method.training import Outcome, VoidLoss, example, figures, network, score
from sparsekern.recipes.measure import macs, parameters
from sparsekern.recipes.metrics import SegmentationLoss
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import KINDS, splits

TINY = Settings(width=8, depth=2, steps=6, batch=2, crop=32)
PLACE = {"machine": "here", "torch": "2", "threads": 1, "commit": "abc"}


def tiny(name: str) -> Set:
    kind = KINDS[name]
    return Set(name, cache(lambda: splits(kind, train=4, test=2, size=32)), kind.classes, kind.void)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of a tiny network, with the default, its widths anew, and an arm of equal time."""
    torch.set_num_threads(1)
    old, runs.MODELS = runs.MODELS, {"unet": TINY}
    study = Study(tmp_path_factory.mktemp("study") / "m.jsonl", {"scenes": tiny("scenes")}, PLACE)
    for arm in ("fresh", "narrow-time"):
        study.execute_if_new(Run("unet", 0.5, 0, arm, "scenes"))
    yield study
    runs.MODELS = old


def line(study, arm):
    return next(record for record in study.records if record["arm"] == arm)


def test_an_arm_that_builds_on_others_runs_them_first(study):
    order = [record["arm"] for record in study.records]
    assert sorted(order) == ["default", "fresh", "narrow", "narrow-time"]
    assert order.index("default") < order.index("fresh") and order.index("narrow") < order.index(
        "narrow-time"
    )


def test_fresh_weights_have_the_widths_of_the_default(study):
    default, fresh = line(study, "default"), line(study, "fresh")
    for what in ("widths", "macs", "parameters", "activation_bytes"):
        assert default[what] == fresh[what]
    assert default["loss"] != fresh["loss"]


def test_an_arm_of_equal_time_gets_the_steps_for_it(study):
    default, narrow, timed = (line(study, arm) for arm in ("default", "narrow", "narrow-time"))
    assert timed["steps"] == round(6 * default["processor_seconds"] / narrow["processor_seconds"])
    assert timed["macs"] == narrow["macs"] == pytest.approx(default["macs"], rel=0.1)


def test_a_line_says_where_it_comes_from(study):
    assert all(PLACE.items() <= record.items() for record in study.records)
    assert all(0 <= record[what] <= 1 for record in study.records for what in ("dice", "averaged_dice"))


def test_what_is_in_the_file_is_not_run_again(study):
    again = Study(study.path, study.sets, PLACE)
    for arm in ("default", "fresh", "narrow", "narrow-time"):
        assert again.done(Run("unet", 0.5, 0, arm, "scenes")) is not None
    assert again.done(Run("unet", 0.5, 1, "default", "scenes")) is None
    assert again.done(Run("unet", 0.2, 0, "default", "scenes")) is None


def test_a_line_of_another_recipe_or_training_counts_for_nothing(study):
    key = Run("unet", 0.5, 0, "default", "scenes").key(
        study.settings(Run("unet", 0.5, 0, "default", "scenes"))
    )
    assert find(study.records, key) is line(study, "default")
    assert find(study.records, key | {"recipe": "another"}) is None
    assert find(study.records, key | {"training": key["training"] | {"steps": 7}}) is None
    assert find(study.records, key | {"training": key["training"] | {"lr": 0.5}}) is None
    # Arms that depend on the default change with it.
    assert ARMS["default"].recipe() in ARMS["fresh"].recipe()


def test_current_lines_are_those_that_would_not_run_again(study):
    assert current(study.records) == study.records
    assert current([record | {"recipe": "another"} for record in study.records]) == []
    assert current([record | {"arm": "removed"} for record in study.records]) == []
    other = [record | {"training": record["training"] | {"lr": 0.5}} for record in study.records]
    assert current(other) == []


class Left:
    """A Pruner of which a quarter of the MACs is left."""

    def metrics(self):
        return {"macs_share": 0.25}


def test_rates_that_rise_as_the_network_shrinks():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 2, 2))
    optimizer = torch.optim.SGD(training._groups(model), lr=1)

    def rates(pruner, **powers):
        arm = replace(ARMS["default"], **powers)
        return [rate(50) for rate in training._rates(arm, model, optimizer, pruner, 100)]

    plain = rates(None, rate_power=0.5)
    assert plain == rates(Left()) and plain[0] == plain[1] > 0
    assert rates(Left(), rate_power=0.5) == pytest.approx([2 * plain[0]] * 2)
    assert rates(Left(), rate_power=0.5, gain_power=0.5) == pytest.approx([2 * plain[0], 4 * plain[0]])


def test_a_rate_that_rises_as_a_weight_loses_inputs():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 2, 2))
    optimizer = torch.optim.SGD(training._groups(model, apart=True), lr=1)
    rates = training._rates(replace(ARMS["default"], fan_in_power=1.0), model, optimizer, None, 100)
    before = [rate(50) for rate in rates]
    model[0].weight.data = model[0].weight.data[:6, :2]
    model[1].weight.data = model[1].weight.data[:6]
    assert [rate(50) for rate in rates] == pytest.approx([2 * before[0], 8 / 6 * before[1], before[2]])


def test_an_arm_trains_at_its_own_rate_unless_the_run_names_one(monkeypatch):
    rates = {"unet": {"default": {"scenes": 0.1}, "narrow": {"scenes": 0.2}}, "mobilenetv3": {}}
    monkeypatch.setattr(runs, "RATES", rates)
    for arm, rate in (("default", 0.1), ("shuffled", 0.1), ("fresh", 0.2), ("narrow-time", 0.2)):
        assert Run("unet", 0.5, 0, arm, "scenes").rate() == rate
    monkeypatch.setattr(runs, "MODELS", {"unet": UNET, "mobilenetv3": MOBILENET})
    assert Run("unet", 0.5, 0, "dense", "scenes").rate() == UNET.lr
    assert Run("unet", 0.5, 0, "default", "scenes", lr=0.3).rate() == 0.3
    assert Run("mobilenetv3", 0.5, 0, "default", "scenes").rate() == MOBILENET.lr


def test_equal_runs_give_equal_scores(study):
    run = Run("unet", 0.5, 0, "narrow", "scenes")
    again = Study(study.path.with_name("again.jsonl"), study.sets, PLACE).execute(run)
    for what in ("dice", "averaged_dice", "loss", "widths"):
        assert again[what] == line(study, "narrow")[what]


def test_the_cost_of_a_line_is_that_of_the_network():
    model, own = network(ARMS["narrow"], TINY, 0.3, 0, None)
    model.eval()
    line = figures(Outcome(model, model, own, 0.0, 0.0, 0.0), tiny("vessels"), TINY)
    assert line["macs"] == macs(model, example(TINY)) and line["parameters"] == parameters(model)


def test_the_report_has_the_numbers_of_the_lines(study):
    text = tables.report(lines.read(study.path))
    assert f"| default | sparsekern as it comes | {line(study, 'default')['dice']:.4f} (1) |" in text
    difference = line(study, "default")["dice"] - line(study, "fresh")["dice"]
    assert f"| fresh | {difference:+.4f} (1 seed) |" in text
    with pytest.raises(ValueError, match="results: got no complete line"):
        tables.report([])


def test_the_queue_takes_all_sets_of_an_arm_and_all_arms_of_a_seed_together():
    order = list(queue(["a", "b"], [Stage("unet", 0.1, ["dense", "narrow"])], range(2)))
    assert [(run.seed, run.arm, run.set) for run in order[:5]] == [
        (0, "dense", "a"),
        (0, "dense", "b"),
        (0, "narrow", "a"),
        (0, "narrow", "b"),
        (1, "dense", "a"),
    ]
    some = Stage("unet", 0.1, ["dense"], ["b", "c"])
    assert [run.set for run in queue(["a", "b"], [some], range(1))] == ["b"]
    assert {arm for stage in STAGES for arm in stage.arms} == set(ARMS)


def test_void_pixels_count_neither_in_the_loss_nor_in_the_scores():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 8, 16, 16, generator=random)
    target = torch.randint(8, (2, 16, 16), generator=random)
    loss = VoidLoss(255)
    assert loss(logits, target).item() == pytest.approx(SegmentationLoss()(logits, target).item(), rel=1e-6)
    target[:, :, 8:] = 255
    half = loss(logits[..., :8], target[..., :8]).item()
    assert loss(logits, target).item() == pytest.approx(half, rel=1e-6)
    changed = logits.clone()
    changed[..., 8:] = 50 * torch.randn(2, 8, 16, 8, generator=random)
    assert loss(changed, target).item() == pytest.approx(half, rel=1e-6)


def test_scores_without_void_are_those_of_the_recipes():
    from sparsekern.recipes.metrics import evaluate

    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 1, 1).eval()
    split = KINDS["vessels"].generate(3, 32, 0)
    assert score(model, split, 2, None) == pytest.approx(evaluate(model, split, 2))
