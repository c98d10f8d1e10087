"""A shrinking training that is killed at random moments: ``python tests/prune/killed.py --times 50``.

Every time a training is killed by SIGKILL and started again until it ends; its last checkpoint then has to
be, bit by bit, that of a training that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

import sparsekern
from sparsekern import Pruner
from sparsekern.recipes.models import UNet

STEPS = 40
ROOT = Path(__file__).parents[2]


def train(folder: Path) -> None:
    """The whole training, or what is left of it after the checkpoint in ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = UNet(3, 1, width=4, depth=2)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    average = AveragedModel(model)
    pruner = Pruner(
        model,
        optimizer,
        torch.randn(1, 3, 16, 16),
        keep=0.3,
        steps=STEPS,
        events=6,
        shrink=True,
        round_to=1,
        also=[average],
    )
    path, first = folder / "run.pt", 0
    if path.exists():
        extra = pruner.load_checkpoint(path)
        scheduler.load_state_dict(extra["scheduler"])
        first = extra["step"]
    for step in range(first, STEPS):
        # Inputs come from the generator, so that its state has to be right as well.
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.update_parameters(model)
        pruner.save_checkpoint(path, step=step + 1, scheduler=scheduler.state_dict())
    (folder / "done").touch()


def start(folder: Path) -> subprocess.Popen[bytes]:
    """A training in ``folder`` in a process of its own."""
    command = [sys.executable, __file__, "--train", str(folder)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def undisturbed(folder: Path) -> tuple[float, float]:
    """Seconds until the first checkpoint and until the end of a training that runs through."""
    begin, first = time.monotonic(), None
    process = start(folder)
    while process.poll() is None:
        if first is None and (folder / "run.pt").exists():
            first = time.monotonic() - begin
        time.sleep(0.005)
    assert process.returncode == 0
    assert first is not None
    return first, time.monotonic() - begin


def killed(folder: Path, first: float, end: float, chance: random.Random) -> int:
    """Kill a training and start it again until it gets through; how many times it was killed."""
    times = 0
    while not (folder / "done").exists():
        process = start(folder)
        try:
            process.wait(chance.uniform(0.9 * first, end))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            times += process.wait() == -signal.SIGKILL
        else:
            assert process.returncode == 0
    return times


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def campaign(times: int, seed: int = 0) -> tuple[int, int]:
    """How many of so many disturbed trainings end as the undisturbed one, and kills in all."""
    chance, good, kills = random.Random(seed), 0, 0
    with TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        first, end = undisturbed(whole)
        expected = torch.load(whole / "run.pt", weights_only=True)
        for number in range(times):
            folder = Path(name) / str(number)
            folder.mkdir()
            kills += killed(folder, first, end, chance)
            good += same(torch.load(folder / "run.pt", weights_only=True), expected)
    return good, kills


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=Path)
    parser.add_argument("--times", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.train is not None:
        train(arguments.train)
    else:
        good, kills = campaign(arguments.times)
        print(f"{good} of {arguments.times} bit-identical, killed {kills} times")
        sys.exit(good != arguments.times)
