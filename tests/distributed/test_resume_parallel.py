"""Checkpoints of several processes: one file, written by one of them, with the generators of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.training import STEPS, Run, start
from torch import Tensor

from benchmarks.processes import run

SHRINK = {"shrink": True, "round_to": 1}


def _end(own: Run) -> dict[str, Any]:
    rows = own.pruner.state_dict()["rows"]
    state = [own.optimizer.state[param] for param in own.inner.parameters()]
    return {
        "tensors": [
            *own.inner.state_dict().values(),
            *(value for entry in state for value in entry.values()),
            *(value for value in rows.values() if isinstance(value, Tensor)),
            torch.rand(4),
        ],
        "losses": own.losses[-1],
        "metrics": own.pruner.metrics(),
    }


def _undisturbed(folder: str, stops: list[int]) -> dict[str, Any]:
    own = start("parallel", **SHRINK)
    torch.manual_seed(dist.get_rank())
    done = 0
    for stop in stops:
        own.train(range(done, stop))
        own.pruner.save_checkpoint(Path(folder) / f"{stop}.pt", step=stop)
        done = stop
    own.train(range(done, STEPS))
    return _end(own)


def _resumed(folder: str, stops: list[int]) -> list[dict[str, Any]]:
    ends = []
    for stop in stops:
        own = start("parallel", **SHRINK)
        torch.manual_seed(99)
        step = own.pruner.load_checkpoint(Path(folder) / f"{stop}.pt")["step"]
        own.train(range(step, STEPS))
        ends.append(_end(own))
    return ends


def test_two_processes_go_on_bit_by_bit(tmp_path: Path) -> None:
    stops = [4, 9]
    expected = run(_undisturbed, 2, str(tmp_path), stops)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{stop}.pt" for stop in stops)
    assert not torch.equal(expected[0]["tensors"][-1], expected[1]["tensors"][-1])
    for rank, ends in enumerate(run(_resumed, 2, str(tmp_path), stops)):
        for end in ends:
            assert end["metrics"] == expected[rank]["metrics"]
            assert end["losses"] == expected[rank]["losses"]
            for own, other in zip(end["tensors"], expected[rank]["tensors"], strict=True):
                assert torch.equal(own, other)


def _messages(folder: str) -> list[str]:
    """The error of each process if one cannot write, and if one cannot read."""
    own = start("parallel", **SHRINK)
    rank, path = dist.get_rank(), Path(folder) / "run.pt"
    messages = []
    for action, where in (
        (own.pruner.save_checkpoint, Path(folder) / "nowhere" / "run.pt"),
        (own.pruner.save_checkpoint, path),
        (own.pruner.load_checkpoint, path if rank == 0 else Path(folder) / "gone.pt"),
    ):
        try:
            action(where)
        except (OSError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    own.train(range(2))
    return messages


def test_all_processes_hear_of_one_that_fails(tmp_path: Path) -> None:
    first, second = run(_messages, 2, str(tmp_path))
    assert first[0].startswith("FileNotFoundError: path: cannot write")
    assert second[0].startswith("RuntimeError: writing")
    assert "rank 0 failed" in second[0]
    assert first[1].startswith("RuntimeError: reading")
    assert "rank 1 failed" in first[1]
    assert second[1].startswith("FileNotFoundError")


def _sharded(folder: str) -> None:
    own = start("sharded")
    for action in (own.pruner.save_checkpoint, own.pruner.load_checkpoint):
        with pytest.raises(
            ValueError, match="^model: got a DTensor as 'stem.0.weight', expected plain tensors"
        ):
            action(Path(folder) / "run.pt")


def test_sharded_models_have_checkpoints_of_their_own(tmp_path: Path) -> None:
    run(_sharded, 2, str(tmp_path))
    assert not list(tmp_path.iterdir())
