"""The training that :mod:`benchmarks.faults` kills: a UNet that shrinks, with many checkpoints."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import sparsekern
from sparsekern.distributed.tensors import unwrap
from sparsekern.recipes.models.unet import UNet

SIZE, BATCH, DROPOUT = 32, 4, 0.1


class Phase(IntEnum):
    """The activity of a process when it was killed."""

    START = 0
    TRAIN = 1
    SAVE = 2
    END = 3


class Watch(ctypes.Structure):
    """Progress of a run's processes in shared memory, read by the process that kills them."""

    _fields_ = (("phase", ctypes.c_int), ("step", ctypes.c_int), ("save_seconds", ctypes.c_double))


@dataclass(frozen=True)
class Job:
    """A run: the place of its files, its length in steps and its number of processes."""

    folder: Path
    processes: int
    steps: int
    every: int
    seed: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def end(self, rank: int) -> Path:
        """The whole state of a process after the last step."""
        return self.folder / f"end-{rank}.pt"


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Noise, float32 ``[BATCH, 3, SIZE, SIZE]``, and a mask of its bright pixels with 1 channel."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    smooth = F.avg_pool2d(x.mean(1, keepdim=True), 5, stride=1, padding=2)
    return x, (smooth > 0).float()


def augment(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Random mirroring, brightness and dropout, from the generators of Python, NumPy and torch."""
    if random.random() < 0.5:
        x, y = x.flip(-1), y.flip(-1)
    return F.dropout(x + float(np.random.normal(0, 0.1)), DROPOUT), y


def train(job: Job, rank: int, meeting: str, watch: Any) -> None:
    """Go on from the checkpoint, if there is one, to the end of the run.

    Args:
        meeting: a file that does not exist yet, where the processes of this start find each other.
        watch: a :class:`Watch` in shared memory.
    """
    watch.phase = Phase.START
    torch.set_num_threads(1)
    if job.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=job.processes)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(job.seed)
    model: nn.Module = UNet(width=16, depth=1)
    average = AveragedModel(model)
    if job.processes > 1:
        model = DistributedDataParallel(model)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    pruner = sparsekern.Pruner(
        model,
        optimizer,
        batch(0)[0],
        keep=0.2,
        steps=job.steps,
        events=6,
        shrink=True,
        round_to=1,
        also=[average],
    )
    # Every process has its own dropout.
    torch.manual_seed(job.seed + 1 + rank)
    step = 0
    if job.checkpoint.exists():
        extra = pruner.load_checkpoint(job.checkpoint)
        scheduler.load_state_dict(extra["scheduler"])
        step = extra["step"]
    watch.phase = Phase.TRAIN
    while step < job.steps:
        x, y = augment(*batch(step * job.processes + rank))
        F.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.update_parameters(unwrap(model))
        step += 1
        watch.step = step
        if step % job.every == 0 or step == job.steps:
            watch.phase = Phase.SAVE
            begin = perf_counter()
            pruner.save_checkpoint(job.checkpoint, step=step, scheduler=scheduler.state_dict())
            watch.save_seconds = perf_counter() - begin
            watch.phase = Phase.TRAIN
    if job.processes > 1:
        # Until the next forward pass of DistributedDataParallel each process has the batch norm statistics of
        # its own last batch. That pass broadcasts those of the first process, and those are saved.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    parts = {
        "model": model,
        "average": average,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "pruner": pruner,
    }
    held: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    held["random"] = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    torch.save(held, job.end(rank))
    watch.phase = Phase.END
    if job.processes > 1:
        dist.destroy_process_group()
