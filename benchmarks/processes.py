"""Running a function in several processes that form a group, without ever hanging."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
# Processes are forked from one that has imported these: a start then takes a fraction of a second.
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.export",
        "torch._dynamo",
        "sparsekern",
    ]
)


def run(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 180.0) -> list[Any]:
    """Run ``function(*arguments)`` in ``ranks`` processes of one gloo group; returns the results by rank.

    Each computes with one thread. Results go through a file: tensors, arrays and plain values. The first
    process that fails takes the others down with it, and so does the time limit ``timeout`` (seconds).

    Raises:
        AssertionError: a process failed, or had not ended at the time limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(
                target=_enter, args=(function, rank, ranks, folder, timeout, arguments), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(ranks)]


def _wait(processes: list[Any], folder: Path, end: float) -> None:
    running = dict(enumerate(processes))
    while running:
        left = end - time.monotonic()
        if left <= 0:
            raise AssertionError(f"ranks {sorted(running)} had not ended at the time limit")
        multiprocessing.connection.wait([process.sentinel for process in running.values()], left)
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode != 0:
                report = folder / f"error-{rank}.txt"
                text = report.read_text() if report.exists() else f"exit code {process.exitcode}"
                raise AssertionError(f"rank {rank} failed:\n{text}")


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"


def _enter(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    folder: str,
    timeout: float,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            # A process that waits for another one can report its error before all are ended.
            timeout=datetime.timedelta(seconds=timeout / 2),
        )
        torch.save(function(*arguments), _result(folder, rank))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
