"""A training in one file: written as a whole, loaded into fresh full-size objects, equal bit for bit."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prune.networks import Plain, batch, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sparsekern
from sparsekern import Pruner

STEPS = 24
Parts = tuple[nn.Module, torch.optim.Optimizer, Pruner]


def parts(seed: int = 0, ours: bool = True, width: int = 16, **options: Any) -> Parts:
    torch.manual_seed(seed)
    model = Plain(width).to(memory_format=torch.channels_last)
    make = sparsekern.optim.AdamW if ours else torch.optim.RMSprop
    optimizer = make(model.parameters(), lr=1e-3)
    defaults: dict = {"keep": 0.3, "steps": STEPS, "events": 4, "shrink": True, "round_to": 2}
    return model, optimizer, Pruner(model, optimizer, batch(0), **(defaults | options))


def assert_same(ours: Parts, theirs: Parts) -> None:
    for name, value in ours[0].state_dict().items():
        assert torch.equal(value, theirs[0].state_dict()[name]), name
    for mine, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        for key, value in ours[1].state[mine].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[1].state[other][key])), key
    assert ours[2].metrics() == theirs[2].metrics()
    state, its_state = ours[2].state_dict(), theirs[2].state_dict()
    assert torch.equal(state["channels"], its_state["channels"])
    for name, value in state["rows"].items():
        assert not isinstance(value, Tensor) or torch.equal(value, its_state["rows"][name]), name
    assert ours[2].plan() == theirs[2].plan()


@pytest.mark.parametrize("ours", [True, False], ids=["fused", "hooks"])
@pytest.mark.parametrize("stop", range(1, STEPS + 3, 2))
def test_bit_identical_wherever_a_shrunk_run_was_stopped(stop: int, ours: bool, tmp_path: Path) -> None:
    run = parts(ours=ours)
    train(*run[:2], range(stop))
    run[2].save_checkpoint(tmp_path / "checkpoint.pt", epoch=3, weights={"a": torch.ones(2)})
    train(*run[:2], range(stop, STEPS + 4))

    resumed = parts(seed=1, ours=ours)
    extra = resumed[2].load_checkpoint(tmp_path / "checkpoint.pt")
    assert extra["epoch"] == 3
    assert torch.equal(extra["weights"]["a"], torch.ones(2))
    train(*resumed[:2], range(stop, STEPS + 4))
    assert_same(run, resumed)


@pytest.mark.parametrize("stop", [3, 9, 14, STEPS])
def test_state_dicts_alone_do_as_well(stop: int) -> None:
    run = parts()
    train(*run[:2], range(stop))
    state = copy.deepcopy([part.state_dict() for part in run])
    train(*run[:2], range(stop, STEPS))
    resumed = parts(seed=1)
    # A resumed run may have trained before; its earlier state is replaced.
    train(*resumed[:2], range(2))
    resumed[2].load_state_dict(state[2])
    resumed[0].load_state_dict(state[0])
    resumed[1].load_state_dict(state[1])
    train(*resumed[:2], range(stop, STEPS))
    assert_same(run, resumed)


def test_a_run_that_shrank_by_hand_is_resumed_at_its_size(tmp_path: Path) -> None:
    run = parts(shrink=False)
    train(*run[:2], range(16))
    run[2].shrink()
    train(*run[:2], range(16, 19))
    run[2].save_checkpoint(tmp_path / "checkpoint.pt")
    train(*run[:2], range(19, STEPS))
    resumed = parts(seed=1, shrink=False)
    resumed[2].load_checkpoint(tmp_path / "checkpoint.pt")
    train(*resumed[:2], range(19, STEPS))
    assert_same(run, resumed)


def test_copies_are_saved_with_the_run_and_brought_to_its_size(tmp_path: Path) -> None:
    def with_averages(seed: int) -> tuple[Parts, AveragedModel, AveragedModel]:
        torch.manual_seed(seed)
        model = Plain()
        optimizer = sparsekern.optim.AdamW(model.parameters())
        first, second = AveragedModel(model), AveragedModel(model)
        options: dict = {"keep": 0.3, "steps": STEPS, "events": 4, "shrink": True, "round_to": 2}
        return (
            (model, optimizer, Pruner(model, optimizer, batch(0), also=[first], **options)),
            first,
            second,
        )

    (model, optimizer, pruner), first, _ = with_averages(0)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        first.update_parameters(model)
    pruner.save_checkpoint(tmp_path / "checkpoint.pt")
    resumed, its_first, its_second = with_averages(1)
    resumed[2].load_checkpoint(tmp_path / "checkpoint.pt", also=[its_second])
    assert int(its_first.n_averaged) == STEPS
    for own, other, size in zip(
        first.parameters(), its_first.parameters(), its_second.parameters(), strict=True
    ):
        assert torch.equal(own, other)
        assert size.shape == own.shape
    with pytest.raises(ValueError, match="checkpoint: got 1 copies of the model, expected 0"):
        parts()[2].load_checkpoint(tmp_path / "checkpoint.pt")


def test_random_numbers_go_on(tmp_path: Path) -> None:
    _, _, pruner = parts()
    pruner.save_checkpoint(tmp_path / "checkpoint.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss(0, 1)
    _, _, other = parts(seed=1)
    other.load_checkpoint(tmp_path / "checkpoint.pt")
    again = torch.rand(3), np.random.rand(3), random.random(), np.random.randn(), random.gauss(0, 1)
    assert torch.equal(drawn[0], again[0])
    assert (drawn[1] == again[1]).all()
    assert drawn[2:] == again[2:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = parts()
    train(*run[:2], range(12))
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    run[2].save_checkpoint(path, step=12)
    return path


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_tool(path: Path) -> None:
    path.write_bytes(b"\x89PNG and something else")


def other_content(path: Path) -> None:
    torch.save({"model": {}}, path)


def with_code(path: Path) -> None:
    torch.save({"format": os.getcwd}, path)


def newer(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"version": 9}, path)


def incomplete(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    torch.save(content, path)


def gone(path: Path) -> None:
    path.unlink()


DAMAGES: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (truncated, ValueError, "cannot be read"),
    (half, ValueError, "cannot be read"),
    (empty, ValueError, "cannot be read"),
    (of_another_tool, ValueError, "cannot be read"),
    (with_code, ValueError, "cannot be read"),
    (other_content, ValueError, "was not written by Pruner.save_checkpoint"),
    (newer, ValueError, "has format version 9, expected 1"),
    (incomplete, ValueError, "has no entry 'optimizer'"),
    (gone, FileNotFoundError, "No such file"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGES, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_no_checkpoint_is_refused_and_changes_nothing(
    damage: Callable[[Path], None], kind: type[Exception], message: str, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(written.read_bytes())
    damage(path)
    run, twin = parts(), parts()
    with pytest.raises(kind, match=f"path: .*checkpoint.pt.*{message}"):
        run[2].load_checkpoint(path)
    assert_same(run, twin)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"width": 24}, "state: got the channels of another network"),
    ({"keep": 0.5}, "^state: got one saved with keep=0.3, expected keep=0.5"),
    ({"shrink": False}, "^state: got one saved with shrink=True, expected shrink=False"),
    ({"ours": False}, "^checkpoint: got AdamW as its optimizer, expected RMSprop"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_another_run_refuses_it_and_stays_as_it_was(
    change: dict[str, Any], message: str, written: Path
) -> None:
    run, twin = parts(**change), parts(**change)
    with pytest.raises(ValueError, match=f"^{message}"):
        run[2].load_checkpoint(written)
    assert not run[1].state
    assert_same(run, twin)


def test_a_model_that_is_smaller_already_cannot_go_back(written: Path) -> None:
    run = parts()
    train(*run[:2], range(STEPS))
    metrics = run[2].metrics()
    with pytest.raises(
        ValueError, match=r"^state: got \d+ channels that have been cut out of this model since"
    ):
        run[2].load_checkpoint(written)
    assert run[2].metrics() == metrics


def test_other_groups_of_the_optimizer_are_refused(written: Path) -> None:
    torch.manual_seed(0)
    model = Plain()
    optimizer = sparsekern.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=1e-3)
    pruner = Pruner(model, optimizer, batch(0), keep=0.3, steps=STEPS, events=4, shrink=True, round_to=2)
    with pytest.raises(ValueError, match="^checkpoint\\['optimizer'\\]: got groups of"):
        pruner.load_checkpoint(written)
    assert pruner.metrics()["params_share"] == 1


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    _, _, pruner = parts()
    with pytest.raises(ValueError, match=r"^path_of_data: got PosixPath, expected tensors and plain values"):
        pruner.save_checkpoint(tmp_path / "checkpoint.pt", path_of_data=tmp_path)
    with pytest.raises(FileNotFoundError, match="^path: cannot write"):
        pruner.save_checkpoint(tmp_path / "nowhere" / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
from prune.test_checkpoint import parts

model, optimizer, pruner = parts()
def half(content, path):
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
pruner.save_checkpoint(sys.argv[1])
"""


def test_kill_9_while_saving_leaves_the_old_file_whole(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(written.read_bytes())
    here = Path(__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(path)],
        check=False,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
    )
    assert process.returncode == -signal.SIGKILL
    assert parts()[2].load_checkpoint(path) == {"step": 12}
