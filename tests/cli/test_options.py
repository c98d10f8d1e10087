"""The options of train: their names, ranges, files, and the output of a run."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest
import torch
from cli.conftest import SMALL

import sparsekern
from sparsekern.cli import run
from sparsekern.cli.train import train as command
from sparsekern.recipes.load import load_data
from sparsekern.recipes.settings import Settings, build_model, build_pruner, parse_select
from sparsekern.recipes.train import Trainer


def options() -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(command).parameters)


def test_every_option_that_is_an_argument_of_pruner_has_its_name_and_default():
    ours, theirs = options(), inspect.signature(sparsekern.Pruner).parameters
    # `--depth` is that of the UNet.
    shared = ours.keys() & theirs.keys() - {"model", "steps", "keep", "depth"}
    assert shared >= {
        "of",
        "select",
        "allocate",
        "round_to",
        "min_channels",
        "warmup",
        "finish",
        "events",
        "shrink",
    }
    for name in shared - {"select", "allocate"}:
        assert ours[name].default == theirs[name].default, name
    # These are names of objects, whose default the Pruner gives as None.
    assert parse_select(ours["select"].default) == sparsekern.criteria.default()
    assert ours["allocate"].default == "global" and theirs["allocate"].default is None


def test_every_option_for_the_pruner_reaches_it_under_its_name(monkeypatch):
    seen = {}
    monkeypatch.setattr(sparsekern, "Pruner", lambda *arguments, **options: seen.update(options))
    given = {"of": "params", "steps": 77, "min_channels": 3, "warmup": 0.23, "finish": 0.77, "events": 5}
    given |= {"shrink": True, "round_to": 2, "keep": 0.3}
    settings = Settings(**given)
    model = torch.nn.Linear(2, 2)
    build_pruner(model, torch.optim.SGD(model.parameters()), torch.ones(1, 2), settings)
    assert {name: seen[name] for name in given} == given


def test_every_setting_is_an_option_with_its_default():
    found = {name: parameter.default for name, parameter in options().items()}
    for entry in fields(Settings):
        if entry.name not in ("keep", "classes"):  # open until --dense and a file of classes are known
            assert found[entry.name] == entry.default, entry.name


def refused(arguments, capsys):
    """The line on stderr of a refused call; there is no data to read."""
    assert run(["train", "--data", "nowhere", *arguments]) == 2
    return capsys.readouterr().err


BAD = {
    "keep": "1.5", "warmup": "1", "finish": "0.05", "events": "0", "round-to": "0", "min-channels": "0",
    "lr": "nan", "weight-decay": "inf", "lr-warmup": "-1", "steps": "0", "batch": "-2", "crop": "8",
    "classes": "1", "depth": "0", "width": "1.5", "seed": "-1", "evaluations": "0", "device": "abacus",
    "amp": "int8", "of": "watts",
    "select": "luck", "allocate": "fair", "decoder": "none", "model": "vgg", "epochs": "0", "threads": "-1",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_range_is_checked_before_the_data(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refused([f"--{name}", BAD[name]], capsys).replace("warning", "").splitlines()[-1]
    assert text.startswith(f"error: --{name}: got "), text
    assert "expected" in text and not list(tmp_path.iterdir())


def test_too_few_steps_for_an_event_are_refused_before_the_data(capsys):
    assert "error: --steps: got 1, expected enough steps for one event" in refused(["--steps", "1"], capsys)


def test_the_old_names_of_warmup(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("sparsekern.cli.train.find_device", lambda name: seen.append(name))
    monkeypatch.setattr("sparsekern.cli.train.settings_of", spy(seen))
    text = refused(["--begin", "0.25"], capsys)
    assert "warning: --begin is deprecated" in text and "--warmup" in text
    assert seen[0].warmup == 0.25 and seen[0].lr_warmup == Settings.lr_warmup
    assert "error: --begin: got 0.25 with --warmup 0.2" in refused(
        ["--begin", "0.25", "--warmup", "0.2"], capsys
    )
    seen.clear()
    assert "--warmup is the Pruner's since this version" in refused(["--warmup", "0.2"], capsys)
    assert seen[0].warmup == 0.2
    assert "warning" not in refused(["--warmup", "0.2", "--lr-warmup", "0.1"], capsys)
    assert "warning" not in refused([], capsys)


def spy(seen):
    from sparsekern.cli.options import settings_of

    def spied(context, arguments):
        seen.append(settings_of(context, arguments))
        return seen[-1]

    return spied


def test_settings_of_an_earlier_version_are_read():
    old = {"model": "unet", "begin": 0.3, "warmup": 0.02, "keep": None}
    assert Settings.from_json(old) == Settings(warmup=0.3, lr_warmup=0.02, keep=None)
    assert Settings.from_json(Settings().to_json()) == Settings()
    with pytest.raises(ValueError, match="--resume: the run has the setting 'speed'"):
        Settings.from_json({"speed": 3})


FILES = {
    "a.toml": 'keep = 0.4\nround-to = 4\nshrink = true\nselect = "taylor"\n',
    "a.json": '{"keep": 0.4, "round_to": "4", "shrink": true, "select": "taylor", "width": null}',
    "a.yaml": "keep: 0.4\nround-to: 4\nshrink: true\nselect: taylor\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_options_and_the_line_wins(name, capsys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sparsekern.cli.train.settings_of", spy(seen))
    path = tmp_path / name
    path.write_text(FILES[name])
    refused(["--config", str(path), "--select", "random"], capsys)
    expected = Settings(keep=0.4, round_to=4, shrink=True, select="random")
    assert seen == [expected]
    refused(["--config", str(path), "--dense"], capsys)
    assert seen[1].keep is None and not seen[1].shrink


BAD_FILES = {
    "unknown.toml": ("speed = 3", "has 'speed', expected one of"),
    "whole.toml": ("steps = 1.5", "Invalid value for '--steps'"),
    "text.toml": ('keep = "much"', "Invalid value for '--keep'"),
    "range.json": ('{"keep": 1.5}', "--keep: got 1.5, expected"),
    "list.json": ('{"keep": [1]}', "has list for 'keep', expected a number"),
    "array.json": ("[1]", "holds list, expected a table"),
    "broken.json": ("{", "is not valid json"),
    "broken.toml": ("= 3", "is not valid toml"),
    "broken.yaml": ("a: [", "is not valid yaml"),
    "deep.json": ("[" * 100_000, "is not valid json"),
    "twice.toml": ("round-to = 1\nround_to = 2", "in two spellings"),
    "file.ini": ("keep = 1", "expected a file that ends in .toml"),
    "self.toml": ('config = "x"', "has 'config', expected one of"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_use_is_refused_in_one_line(name, capsys, tmp_path):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    found = refused(["--config", str(tmp_path / name)], capsys)
    assert found.startswith("error: ") and found.count("\n") == 1 and message in found
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    assert refused(["--config", str(tmp_path / name)], capsys).count("\n") == 1
    assert "cannot be read" in refused(["--config", str(tmp_path / "nothing.toml")], capsys)


def test_epochs_count_the_images_and_run_json_has_every_option(data, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"steps": 9, "amp": "bf16"}')
    command = ["train", "--data", str(data), "--config", str(tmp_path / "a.json"), *SMALL, "--dense"]
    command += ["--validation", "0"]
    out = tmp_path / "out"
    assert run([*command, "--epochs", "2", "--device", "cpu", "--quiet", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""
    content = json.loads((out / "run.json").read_text())
    # 6 images in batches of 2.
    assert len(content["history"]["loss"]) == content["settings"]["steps"] == 6
    assert content["settings"]["amp"] == "bf16" and content["settings"]["device"] == "cpu"
    assert content["arguments"].keys() >= {"epochs", "config", "quiet", "device", "amp", "lr_warmup"}
    assert content["arguments"]["epochs"] == 2
    assert run([*command, "--epochs", "2", "--steps", "3"]) == 2
    assert "--steps: got 3 with --epochs, expected one of the two" in capsys.readouterr().err


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_in_it_and_resumes_bit_identical(amp, data):
    settings = Settings(width=3, depth=2, batch=2, crop=32, evaluations=1, steps=6, keep=0.5, amp=amp)
    images = load_data(data, settings)
    dtypes = set()

    def trainer():
        made = Trainer(settings, images.train, images.val)
        made.model.head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        return made

    whole, first, second = trainer(), trainer(), trainer()
    whole.run()
    assert {torch.float32} < dtypes  # evaluation is in float32
    assert dtypes - {torch.float32} == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert whole.scaler.is_enabled() == (amp == "fp16")
    first.run(3)
    second.load_state_dict(first.state_dict())
    second.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert whole.scaler.state_dict() == second.scaler.state_dict()
    assert all(map(torch.isfinite, map(torch.tensor, whole.history.loss)))


def test_a_pipe_gets_lines_as_the_training_goes(data, tmp_path, capsys):
    command = ["train", "--data", str(data), *SMALL, "--dense", "--steps", "45", "--out", str(tmp_path)]
    assert run(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dense: step ")]
    assert 20 <= len(lines) <= 22
    assert "  loss " in lines[0] and lines[0].endswith(" s") and "Dice" not in lines[0]
    assert "step 45/45" in lines[-1] and "Dice " in lines[-1]


def test_models_of_equal_settings_are_equal():
    first, second = (build_model(Settings(width=2, depth=1)) for _ in range(2))
    assert torch.equal(first.head.weight, second.head.weight)
