"""Many processes, on this machine over gloo: ``python -m benchmarks.distributed``.

It measures whether the masks equal those of one process with the same global batch, the extra time of a
step with a Pruner, the bytes exchanged before and after a shrink, and the memory to compact a sharded
model. It writes benchmarks/results/distributed.{txt,json}.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsekern
from benchmarks.environment import environment
from benchmarks.processes import run
from benchmarks.saved import save
from sparsekern.recipes.models import UNet

STEPS, IMAGES, SIZE = 16, 8, 32
ROUNDS, BLOCK = 16, 2
PATIENCE = 600.0  # time limit of the processes in seconds


def network(width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A UNet whose batch norms use running statistics, because the statistics of a partial batch differ."""
    torch.manual_seed(0)
    model = UNet(3, 1, width=width).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def distribute(model: nn.Module, how: str) -> nn.Module:
    """``"one process"``, ``"DDP"`` or ``"FSDP2"``."""
    if how == "DDP":
        return DistributedDataParallel(model)
    if how == "FSDP2":
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def batch(step: int, dtype: torch.dtype, size: int = SIZE) -> Tensor:
    """This process's share of the images of a step."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES, 3, size, size, generator=random, dtype=torch.float64).to(dtype)
    if not dist.is_initialized():
        return images
    return images[dist.get_rank() :: dist.get_world_size()]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Forward, backward, update."""
    (model(x) - x.mean(1, keepdim=True).sin()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def masks(how: str) -> tuple[Tensor, list[Tensor], list[int]]:
    """Train in float64; returns the state of every channel, the parameters and the widths."""
    inner = network(8, torch.float64)
    model = distribute(inner, how)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = sparsekern.Pruner(
        model, optimizer, batch(0, torch.float64)[:1], keep=0.2, steps=STEPS, events=4, finish=0.8
    )
    for number in range(STEPS):
        step(model, optimizer, batch(number, torch.float64))
    params = [p.full_tensor() if how == "FSDP2" else p for p in inner.parameters()]  # type: ignore[attr-defined]
    return (
        pruner.state_dict()["channels"],
        [param.detach() for param in params],
        [kept for kept, _ in pruner.widths().values()],
    )


def compare_masks() -> list[dict[str, Any]]:
    """Compare every way to distribute with one process."""
    channels, params, kept = masks("one process")
    rows = []
    for how in ("DDP", "FSDP2"):
        for ranks in (2, 4):
            results = run(masks, ranks, how, timeout=PATIENCE)
            difference = max(
                float((ours - theirs).abs().max() / theirs.abs().max())
                for _, mine, _ in results
                for ours, theirs in zip(mine, params, strict=True)
                if theirs.any()
            )
            equal = all(torch.equal(own, channels) for own, _, _ in results)
            rows.append(
                {"how": how, "ranks": ranks, "channels": len(channels), "kept": sum(kept), "equal": equal}
                | {"difference": difference}
            )
    return rows


def overhead(how: str) -> dict[str, float]:
    """Time of a step with a Pruner over that without, measured in turns; no event occurs meanwhile."""
    sides = []
    for pruned in (False, True):
        model = distribute(network(16), how)
        optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
        if pruned:
            sparsekern.Pruner(model, optimizer, batch(0, torch.float32)[:1], keep=0.2, steps=10**6)
        sides.append((model, optimizer))
    x = batch(0, torch.float32, 64)
    for model, optimizer in sides:
        step(model, optimizer, x)
        step(model, optimizer, x)
    wall: list[list[float]] = [[], []]
    cpu: list[list[float]] = [[], []]
    for number in range(ROUNDS):
        # The second finds the caches of the first, so the two alternate.
        for side in (0, 1) if number % 2 else (1, 0):
            model, optimizer = sides[side]
            begin, begin_cpu = perf_counter(), process_time()
            for _ in range(BLOCK):
                step(model, optimizer, x)
            wall[side].append((perf_counter() - begin) / BLOCK)
            cpu[side].append((process_time() - begin_cpu) / BLOCK)
    return {
        "step_ms": statistics.median(wall[0]) * 1e3,
        "wall_ratio": statistics.median(b / a for a, b in zip(*wall, strict=True)),
        "cpu_ratio": statistics.median(b / a for a, b in zip(*cpu, strict=True)),
    }


def bytes_per_step() -> list[int]:
    """Bytes that DistributedDataParallel all-reduces at each step of a training that shrinks."""
    buckets: list[int] = []
    model = DistributedDataParallel(network(16))
    model.register_comm_hook(None, counting(buckets))
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-3)
    sparsekern.Pruner(
        model,
        optimizer,
        batch(0, torch.float32)[:1],
        keep=0.2,
        steps=STEPS,
        events=4,
        shrink=True,
        round_to=1,
    )
    seen = []
    for number in range(STEPS):
        buckets.clear()
        step(model, optimizer, batch(number, torch.float32))
        seen.append(sum(buckets))
    return seen


def counting(seen: list[int]) -> Callable[..., Any]:
    """A communication hook that runs torch's all-reduce and records the bytes of each bucket."""

    def hook(state: Any, bucket: Any) -> Any:
        seen.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    # Torch checks the annotated types, but annotations are strings in this file.
    hook.__annotations__.clear()
    return hook


def compaction() -> dict[str, float]:
    """Resident memory, in MiB, around compacting a sharded UNet-31M to 0.3 of its MACs."""
    model = distribute(network(64), "FSDP2")
    optimizer = sparsekern.optim.SGD(model.parameters(), lr=1e-3)
    pruner = sparsekern.Pruner(model, optimizer, batch(0, torch.float32)[:1], keep=0.3, steps=1000)
    step(model, optimizer, batch(0, torch.float32)[:1])
    plan = pruner.plan(keep=0.3)
    # The first gathering loads libraries, which must not count.
    next(model.parameters()).full_tensor()  # type: ignore[attr-defined]
    sizes = [param.nbytes for param in model.parameters()]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    small = sparsekern.compact(model, plan)
    return {
        "whole": sum(sizes) / 2**20,
        "largest tensor": max(sizes) / 2**20,
        "compact": sum(param.nbytes for param in small.parameters()) / 2**20,
        "peak above": _status("VmHWM") - before,
    }


def _status(name: str) -> float:
    """A size in MiB from Linux's status file of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main() -> None:
    """Print the tables and write the result files."""
    torch.set_num_threads(1)
    console = Console(width=110, record=True)
    figures: dict[str, Any] = {"environment": environment()}

    figures["masks"] = compare_masks()
    table = Table(
        "against one process", "processes", "channels", "kept", "same masks on all", "largest difference"
    )
    for row in figures["masks"]:
        cells = (row["channels"], row["kept"], "yes" if row["equal"] else "NO", f"{row['difference']:.1e}")
        table.add_row(row["how"], *map(str, (row["ranks"], *cells)))
    console.print(table)

    figures["overhead"] = {how: run(overhead, 2, how, timeout=PATIENCE) for how in ("DDP", "FSDP2")}
    table = Table("2 processes, UNet-2M", "rank", "ms a step", "with a Pruner: wall time", "CPU time")
    for how, ranks in figures["overhead"].items():
        for rank, row in enumerate(ranks):
            ratios = (f"{row['wall_ratio']:.3f}", f"{row['cpu_ratio']:.3f}")
            table.add_row(how, str(rank), f"{row['step_ms']:.1f}", *ratios)
    console.print(table)

    figures["bytes"] = run(bytes_per_step, 2, timeout=PATIENCE)[0]
    table = Table("steps of a DDP training with shrink", "bytes all-reduced a step")
    starts = [i for i, value in enumerate(figures["bytes"]) if i == 0 or value != figures["bytes"][i - 1]]
    for start, stop in zip(starts, [*starts[1:], STEPS], strict=True):
        table.add_row(f"{start + 1} to {stop}", f"{figures['bytes'][start]:,}")
    console.print(table)

    figures["compaction"] = run(compaction, 2, timeout=PATIENCE)[0]
    table = Table(*(f"MiB, {name}" for name in figures["compaction"]), title="compacting under FSDP2")
    table.add_row(*(f"{value:.1f}" for value in figures["compaction"].values()))
    console.print(table)

    console.print(figures["environment"])
    save("distributed", console, figures)


if __name__ == "__main__":
    main()
