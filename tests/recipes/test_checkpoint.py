from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from sparsekern.files.atomic import replacing
from sparsekern.recipes.checkpoint import load_backbone, load_checkpoint, save_checkpoint
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.files import check_writable

STATE = {"weights": torch.arange(1000.0), "step": 3, "names": ["a", None, 0.5, True]}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_comes_back_as_it_was_saved(path):
    state = load_checkpoint(path)
    assert torch.equal(state.pop("weights"), STATE["weights"])
    assert state == {"step": 3, "names": ["a", None, 0.5, True]}
    assert [child.name for child in path.parent.iterdir()] == ["checkpoint.pt"]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-500])


def of_another_tool(path):
    path.write_bytes(b"\x89PNG and something else")


def empty(path):
    path.write_bytes(b"")


def other_content(path):
    torch.save({"weights": torch.zeros(3)}, path)


def with_code(path):
    torch.save({"format": os.getcwd, "state": {}}, path)


@pytest.mark.parametrize("damage", [truncated, of_another_tool, empty, other_content, with_code, os.remove])
def test_what_is_no_checkpoint_is_refused(path, damage):
    damage(path)
    with pytest.raises(InputError, match=r"--resume: .*checkpoint\.pt .*expected"):
        load_checkpoint(path)


def test_backbone_weights_are_a_state_dict(tmp_path):
    torch.save({"features.0": torch.ones(2)}, tmp_path / "weights.pth")
    assert torch.equal(load_backbone(tmp_path / "weights.pth")["features.0"], torch.ones(2))
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("list.pth", "nothing.pth"):
        with pytest.raises(InputError, match=f"--backbone: .*{name}.* expected"):
            load_backbone(tmp_path / name)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise RuntimeError("halfway")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import torch
from sparsekern.recipes.checkpoint import save_checkpoint

def half(content, path):
    Path(path).write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
save_checkpoint(Path(sys.argv[1]), {"step": 4})
"""


def test_kill_9_while_saving_leaves_the_old_checkpoint_whole(path):
    process = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(path)["step"] == 3


def test_an_output_directory_can_be_made_or_is_refused_and_none_stays_behind(tmp_path):
    check_writable(tmp_path / "a" / "b", "--out")
    check_writable(tmp_path, "--out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--out .*cannot be written .*expected"):
        check_writable(tmp_path / "a" / ("b" * 300), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--out .*file.* cannot be written .*expected"):
            check_writable(path, "--out")
    assert (tmp_path / "file").read_text() == "x"
