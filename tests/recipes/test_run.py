from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from recipes.folders import assert_same_network

import sparsekern
from sparsekern.recipes import run as module
from sparsekern.recipes.data import Data
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.metrics import evaluate
from sparsekern.recipes.resume import open_run
from sparsekern.recipes.run import execute
from sparsekern.recipes.settings import Settings, build_model
from sparsekern.recipes.synthetic import generate

SETTINGS = Settings(width=4, depth=2, keep=0.4, steps=16, batch=2, crop=32, evaluations=1)
TEST = generate(2, 40, seed=2)
DATA = Data(generate(4, 40, seed=1), generate(2, 40, seed=3), TEST)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "new" / "out"


@pytest.fixture(scope="module")
def result(out):
    return execute(SETTINGS, DATA, out, arguments={"data": out, "keep": 0.4})


def test_a_run_leaves_its_four_results_and_no_other_file(result, out):
    assert {path.name for path in out.iterdir()} == {
        "run.json",
        "model.safetensors",
        "checkpoint.pt",
    }


def test_run_json_tells_arguments_versions_machine_and_figures(result, out):
    content = json.loads((out / "run.json").read_text())
    assert content["arguments"] == {"data": str(out), "keep": 0.4}
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["figures"] == result.figures
    assert len(content["history"]["loss"]) == 16
    assert Settings(**content["settings"]) == SETTINGS


def test_the_stored_network_is_small_and_scores_what_run_json_says(result, out):
    loaded = sparsekern.load(build_model(SETTINGS), out / "model.safetensors")
    figures = result.figures
    assert sum(p.numel() for p in loaded.parameters()) == figures["parameters"]
    assert figures["macs"] < 0.41 * figures["full"]["macs"]
    assert figures["file_bytes"] < figures["full"]["file_bytes"]
    assert figures["difference"] <= module.TOLERANCE
    assert evaluate(loaded, TEST, 2) == (figures["dice"], figures["miou"])
    # The images that are scored during the training are not those of the final figures.
    assert result.history.scores[-1][1] == pytest.approx(evaluate(loaded, DATA.val, 2).dice, abs=1e-3)
    assert result.history.scores[-1][1] != pytest.approx(figures["dice"], abs=1e-6)
    foreground = figures["classes"][1]
    assert foreground["dice"] == figures["dice"] and foreground["pixels"] == int((TEST.labels == 1).sum())
    assert figures["images"] == {"train": 4, "val": 2, "test": 2, "bits": None}
    assert len(figures["kept"]) == len(figures["channels"]) == len(figures["groups"])


def test_a_dense_run_stores_the_full_network(tmp_path):
    result = execute(replace(SETTINGS, keep=None), DATA, tmp_path, arguments={})
    assert result.figures["parameters"] == result.figures["full"]["parameters"]
    assert "kept" not in result.figures
    sparsekern.load(build_model(SETTINGS), tmp_path / "model.safetensors")


def test_stopped_and_resumed_gives_the_same_file_as_one_run(result, out, tmp_path):
    for stop in (7, None):
        saved = None if stop else open_run(tmp_path)
        again = execute(SETTINGS, DATA, tmp_path, arguments={}, resume=saved, stop_after=stop)
        assert (again is None) is (stop is not None)
        if again is None:
            assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert_same_network(tmp_path / "model.safetensors", out / "model.safetensors")


def test_checkpoints_are_taken_when_due(tmp_path):
    seen = []

    def look(step):
        seen.append((step.step, (tmp_path / "checkpoint.pt").exists()))

    execute(
        replace(SETTINGS, keep=None, steps=5),
        DATA,
        tmp_path,
        arguments={},
        checkpoint_every=2,
        on_step=look,
    )
    assert seen == [(1, False), (2, False), (3, True), (4, True), (5, True)]


def test_a_compact_network_that_differs_is_an_error_and_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(sparsekern, "verify", lambda *arguments: 1e-3)
    with pytest.raises(RuntimeError, match=r"differ from those of the masked network by 1\.0e-03"):
        execute(SETTINGS, DATA, tmp_path, arguments={})
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("argument", ["checkpoint_every", "stop_after"])
def test_negative_numbers_are_refused_before_training(tmp_path, argument):
    name = argument.replace("_", "-")
    with pytest.raises(InputError, match=f"--{name}: got -1, expected 0 or more"):
        execute(SETTINGS, DATA, tmp_path, arguments={}, **{argument: -1})
    assert not list(tmp_path.iterdir())
