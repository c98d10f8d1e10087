"""``sparsekern selftest``: the file, the exit code, and bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from sparsekern import info
from sparsekern.cli import run
from sparsekern.kernels import backends
from sparsekern.kernels.backends import cpu, reference
from sparsekern.kernels.selfcheck import cases, first_use

pytestmark = pytest.mark.skipif(backends.why_not("cpu", "cpu") is not None, reason="needs the compiled core")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(itertools.islice(cases.every(), 0, 60, 12))
    monkeypatch.setattr(cases, "every", lambda: chosen)


@pytest.mark.usefixtures("few")
def test_a_backend_that_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "file.json"
    assert run(["selftest", "--device", "cpu", "--out", str(out)]) == 0
    assert "cpu on cpu: 5 of 5 problems solved as by the reference" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["failures"] == 0 and len(document["problems"]) == 5
    assert document["environment"]["versions"]["torch"] and document["settings"]["code"]
    first = document["problems"][0]
    assert first == {
        "op": "sgd",
        "dtype": "float32",
        "layout": "contiguous",
        "detail": "some masked, some fading",
        "ok": True,
    }


@pytest.mark.usefixtures("few")
def test_a_backend_that_lies_and_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step_(op: int, lists: object, options: object, *others: object) -> None:
        if getattr(options, "maximize", False):
            raise RuntimeError("no kernel image")
        reference.step_(op, lists, options, *others)
        lists[0][2].data[0] += 1

    monkeypatch.setattr(cpu, "step_", step_)
    out = tmp_path / "file.json"
    assert run(["selftest", "--backend", "cpu", "--device", "cpu", "--out", str(out)]) == 1
    document = json.loads(out.read_text())
    assert document["failures"] == 5
    errors = [problem["error"] for problem in document["problems"] if "error" in problem]
    differences = [problem["difference"] for problem in document["problems"] if "difference" in problem]
    assert len(errors) + len(differences) == 5 and differences
    assert all("params[2]" in text for text in differences)
    assert all(text == "RuntimeError: no kernel image" for text in errors)
    printed = capsys.readouterr().out
    assert "sgd, torch.float32, contiguous" in printed and "0 of 5 problems" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device: got 'meta', expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device: got 'cuda:99', expected one of the"),
        (["--device", "cpu", "--backend", "cuda"], "--backend: got 'cuda' for cpu, expected one of cpu"),
        (["--device", "cpu", "--backend", "reference"], "--backend: got 'reference' for cpu"),
        (["--device", "cpu", "--out", "/nowhere/file.json"], "--out: "),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "every", lambda: pytest.fail("ran"))
    assert run(["selftest", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_info_shows_the_result_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backends, "why_not", lambda name, device: None if name == "cuda" else "not installed")
    monkeypatch.setattr(
        first_use, "describe", lambda name, device: "passed" if device.index else "failed: adamw"
    )
    shown = info._selfchecks()
    assert [(one["backend"], one["device"], one["result"]) for one in shown] == [
        ("cuda", "cuda:0", "failed: adamw"),
        ("cuda", "cuda:1", "passed"),
    ]
    monkeypatch.undo()
    pairs = info.lines(info.collect() | {"selfcheck": shown})
    assert ("self-check cuda", "cuda:1: passed") in pairs
