"""Runs that are stopped, killed, resumed, extended or about to be overwritten, from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes.folders import assert_same_network, write_data

from sparsekern.cli import run
from sparsekern.recipes import run as module
from sparsekern.recipes import train as training
from sparsekern.recipes.checkpoint import load_checkpoint

SMALL = ["--width", "2", "--depth", "1", "--steps", "12", "--batch", "1", "--crop", "32"]
SMALL += ["--evaluations", "2", "--dense"]
FILES = {"run.json", "model.safetensors", "checkpoint.pt", "curves.png"}


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Stub timings and pictures, which take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "latency", lambda models, image: dict.fromkeys(models, 1.0))
        patch.setattr("sparsekern.report.runs.curves", lambda path, runs: path.touch())
        yield


@pytest.fixture
def saved(monkeypatch):
    """The steps whose checkpoints were written, in order."""
    steps, save = [], module.save_checkpoint
    monkeypatch.setattr(
        module, "save_checkpoint", lambda path, state: steps.append(state["step"]) or save(path, state)
    )
    return steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("stops") / "data", size=32)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(["train", "--data", str(data), *SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def stopped_once(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert run(["train", "--data", str(data), *SMALL, "--out", str(out), "--stop-after", "5"]) == 0
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was stopped after 5 steps."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def step_of(out: Path) -> int:
    return load_checkpoint(out / "checkpoint.pt")["step"]


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def interrupt_at(monkeypatch, step: int, *, signals: int = 1, number: int = signal.SIGINT) -> None:
    """Sends this process a signal while it computes the loss of `step`."""
    forward = training.SegmentationLoss.forward
    calls = iter(range(1, 10**6))

    def sending(self, logits, target):
        if next(calls) == step:
            for _ in range(signals):
                os.kill(os.getpid(), number)
        return forward(self, logits, target)

    monkeypatch.setattr(training.SegmentationLoss, "forward", sending)


@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
def test_resume_alone_goes_on_and_ends_with_the_same_network(stopped, finished, monkeypatch, as_file):
    monkeypatch.chdir(stopped.parent)
    path = "stopped/checkpoint.pt" if as_file else "stopped"
    assert run(["train", "--resume", path]) == 0
    assert {path.name for path in stopped.iterdir()} == FILES
    assert_same_network(stopped / "model.safetensors", finished / "model.safetensors")
    told = [json.loads((out / "run.json").read_text()) for out in (stopped, finished)]
    assert told[0]["settings"] == told[1]["settings"]
    assert told[0]["arguments"]["data"] == told[0]["remembered"]["data"] == told[1]["remembered"]["data"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    data, finished, tmp_path, capsys, monkeypatch, number
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, number=number)
        assert run(["train", "--data", str(data), *SMALL, "--out", str(out)]) == 128 + number
    error = capsys.readouterr().err
    assert error == f"stopped after step 4 of 12; go on with --resume {out}\n"
    assert step_of(out) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(["train", "--resume", str(out)]) == 0
    assert_same_network(out / "model.safetensors", finished / "model.safetensors")


def test_a_second_signal_ends_the_run_at_once(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt_at(monkeypatch, 8, signals=2)
    assert run(["train", "--data", str(data), *SMALL, "--out", str(out)]) == 130
    assert step_of(out) == 6  # of the evaluation before


def test_a_signal_in_an_evaluation_is_answered_there_and_the_evaluation_made_up(
    data, finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    predict = "sparsekern.recipes.metrics.predict"
    with monkeypatch.context() as patch:
        patch.setattr(
            predict, lambda logits: os.kill(os.getpid(), signal.SIGINT) or (logits[:, 0] > 0).long()
        )
        assert run(["train", "--data", str(data), *SMALL, "--out", str(out)]) == 130
    assert step_of(out) == 6 and load_checkpoint(out / "checkpoint.pt")["history"]["scores"] == []
    assert run(["train", "--resume", str(out)]) == 0
    told = [json.loads((folder / "run.json").read_text())["history"]["scores"] for folder in (out, finished)]
    assert told[0] == told[1]


def test_a_signal_after_the_last_step_leaves_the_results_to_resume(
    data, finished, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "latency", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(["train", "--data", str(data), *SMALL, "--out", str(out)]) == 130
    assert f"stopped after step 12 of 12; go on with --resume {out}" in capsys.readouterr().err
    assert run(["train", "--resume", str(out)]) == 0
    assert_same_network(out / "model.safetensors", finished / "model.safetensors")


@pytest.mark.parametrize("place", ["load_data", "Trainer"])
def test_a_signal_in_set_up_leaves_no_folder(data, tmp_path, monkeypatch, place):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    where = {
        "load_data": "sparsekern.recipes.synthetic.load_data",
        "Trainer": "sparsekern.recipes.run.Trainer",
    }
    monkeypatch.setattr(where[place], interrupted)
    out = tmp_path / "a" / "b"
    assert run(["train", "--data", str(data), *SMALL, "--out", str(out)]) == 130
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("every", "expected"), [(None, {6}), ("0", set()), ("5", {5, 10})], ids=["default", "0", "5"]
)
def test_checkpoints_come_as_asked(data, tmp_path, saved, every, expected):
    more = [] if every is None else ["--checkpoint-every", every]
    command = ["train", "--data", str(data), *SMALL, "--out", str(tmp_path / "out"), *more]
    assert run(command) == 0
    assert saved == [*sorted(expected), 12]


def test_a_slow_run_takes_checkpoints_by_time(data, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    assert run(["train", "--data", str(data), *SMALL, "--steps", "4", "--out", str(tmp_path / "out")]) == 0
    assert saved == [1, 2, 3, 4]


KILLED = """
import os, signal, sys
from sparsekern.cli import run
from sparsekern.recipes import train
forward, calls = train.SegmentationLoss.forward, iter(range(1, 100))

def killing(self, logits, target):
    if next(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, logits, target)

train.SegmentationLoss.forward = killing
run(sys.argv[1:])
"""


def test_kill_9_loses_what_came_after_the_latest_checkpoint(data, finished, tmp_path):
    out = tmp_path / "out"
    command = ["train", "--data", str(data), *SMALL, "--out", str(out)]
    process = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"] and step_of(out) == 6
    assert run(["train", "--resume", str(out)]) == 0
    assert_same_network(out / "model.safetensors", finished / "model.safetensors")


@pytest.mark.parametrize("other", [["--dense"], [], ["--shrink"]], ids=["dense", "pruned", "shrunk"])
def test_another_run_never_overwrites_a_finished_one(data, finished, capsys, other):
    before = content(finished)
    command = ["train", "--data", str(data), *SMALL[:-1], "--out", str(finished), *other]
    assert run(command) == 2
    error = capsys.readouterr().err
    for part in ("which holds a finished run", f"--resume {finished}", "--overwrite", "another directory"):
        assert part in error
    assert content(finished) == before


def test_another_run_does_not_overwrite_a_stopped_one_either(data, stopped, capsys):
    before = content(stopped)
    assert run(["train", "--data", str(data), *SMALL, "--out", str(stopped)]) == 2
    assert "which holds a stopped run" in capsys.readouterr().err
    assert content(stopped) == before


def test_overwrite_replaces_a_run_as_a_whole(data, finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    command = ["train", "--data", str(data), *SMALL, "--seed", "3", "--out", str(out), "--overwrite"]
    assert run([*command, "--stop-after", "2"]) == 0
    # No file of the old run is left that could be mistaken for a result of this one.
    assert not (out / "run.json").exists() and not (out / "model.safetensors").exists()
    assert load_checkpoint(out / "checkpoint.pt")["settings"]["seed"] == 3


def test_a_finished_run_has_nothing_to_go_on_with(finished, capsys):
    before = content(finished)
    assert run(["train", "--resume", str(finished)]) == 0
    assert f"{finished} is finished after 12 steps; more --steps extend it" in " ".join(
        capsys.readouterr().out.split("\n")
    ).replace("  ", " ")
    assert content(finished) == before


def test_a_finished_run_is_extended_in_place(finished, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(finished, out)
    assert run(["train", "--resume", str(out), "--steps", "20"]) == 0
    told = json.loads((out / "run.json").read_text())
    assert told["settings"]["steps"] == 20 and len(told["history"]["loss"]) == 20
    assert told["history"]["scores"][-1][0] == 20
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 20


def test_a_stopped_run_is_extended_and_stopped_again_bit_for_bit(stopped, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(stopped, other)
    assert run(["train", "--resume", str(stopped), "--steps", "20"]) == 0
    assert run(["train", "--resume", str(other), "--steps", "20", "--stop-after", "9"]) == 0
    assert run(["train", "--resume", str(other)]) == 0
    assert_same_network(stopped / "model.safetensors", other / "model.safetensors")


def test_resume_into_another_folder_leaves_the_first_alone(stopped, tmp_path):
    before = content(stopped)
    assert run(["train", "--resume", str(stopped), "--out", str(tmp_path / "new")]) == 0
    assert content(stopped) == before
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES


def test_a_run_and_its_data_may_move(data, stopped, finished, tmp_path, capsys):
    moved, images = tmp_path / "moved", tmp_path / "images"
    stopped.rename(moved)
    shutil.copytree(data, images)
    path = moved / "checkpoint.pt"
    state = load_checkpoint(path)
    module.save_checkpoint(
        path, {**state, "remembered": {**state["remembered"], "data": str(tmp_path / "gone")}}
    )
    assert run(["train", "--resume", str(moved)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'gone'}, which {path} remembers, does not exist; expected --data" in error
    assert run(["train", "--resume", str(moved), "--data", str(images)]) == 0
    assert_same_network(moved / "model.safetensors", finished / "model.safetensors")


CONTRADICTIONS = {
    "width": (["--width", "3"], "--width 2.0, this one has 3.0; expected equal arguments"),
    "keep": (["--keep", "0.4"], "--keep None, this one has 0.4"),
    "shrink": (["--shrink"], "--shrink False, this one has True; expected equal"),
    "events": (["--events", "7"], "--events 10, this one has 7"),
    "seed": (["--seed", "1"], "--seed 0, this one has 1"),
    "fewer steps": (["--steps", "11"], "--steps 12, this one has 11; expected that number or more"),
    "validation": (["--validation", "0.5"], "--validation 0.1, this one has 0.5"),
    "class weights": (["--class-weights", "balanced"], "--class-weights None, this one has balanced"),
    "data": (["--data", "other"], "is of other images; expected the same --data"),
    "backbone": (["--backbone", "b.pth"], "--backbone: got b.pth with --resume"),
    "no run": (["--resume", "other"], "--resume: other holds no checkpoint.pt; expected the directory"),
    "nothing": (["--resume", "gone"], "--resume: gone is not a file"),
    "run.json": (["--resume", "run.json"], "--resume: run.json cannot be read"),
    "out": (["--out", "finished"], "--out: got finished, which holds a finished run"),
    "every": (["--checkpoint-every", "-1"], "--checkpoint-every: got -1, expected 0 or more"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_arguments_that_contradict_the_run_are_refused_by_name(
    stopped, finished, tmp_path, capsys, monkeypatch, case
):
    arguments, message = CONTRADICTIONS[case]
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "other", size=36)
    (tmp_path / "finished").symlink_to(finished)
    (tmp_path / "run.json").write_text("{}")
    before = content(stopped)
    capsys.readouterr()
    assert run(["train", "--resume", str(stopped), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert content(stopped) == before


def test_no_data_at_all_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["train"]) == 2
    assert "error: --data: got none, expected a folder or a CSV list" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_demonstration_does_not_overwrite_another_one(tmp_path, capsys):
    for name in ("dense", "pruned"):
        (tmp_path / name).mkdir()
    (tmp_path / "pruned" / "run.json").write_text("{}")
    assert run(["demo", "--out", str(tmp_path)]) == 2
    assert f"--out: got {tmp_path / 'pruned'}, which holds a finished run" in capsys.readouterr().err
