"""Sharded parameters (FSDP2): a smaller model after every event, checkpoints for any number of processes.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 300 --keep 0.2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import accuracy, draw, gratings, network
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekern

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
parser.add_argument("--keep", type=float, default=0.2, help="share of the MACs that stays")
parser.add_argument("--batch", type=int, default=32, help="images a step and process")
parser.add_argument("--folder", type=Path, default=Path("."), help="where the files go")
args = parser.parse_args()

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
train, test = gratings(1000), gratings(200, seed=1)
mesh = init_device_mesh("cpu", (ranks,))


def shard(model: nn.Module) -> None:
    """What makes a sharded model of the first one, and of every smaller one."""
    fully_shard(model, mesh=mesh)


model: nn.Module = network()
shard(model)
optimizer: torch.optim.Optimizer = sparsekern.optim.AdamW(model.parameters(), lr=2e-3)
pruner = sparsekern.Pruner(model, optimizer, train[:1][0], keep=args.keep, steps=args.steps)


def sharded_state() -> dict[str, Any]:
    """Weights and optimizer state, of which each process has its part."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def save(folder: Path, step: int) -> None:
    """The Pruner's state is whole and the same in all processes, so that one of them writes it."""
    progress = {"pruner": pruner.state_dict(), "step": step}
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(progress, folder / "progress.pt")
    dist.barrier()
    dcp.save(sharded_state(), checkpoint_id=folder)


start = 0
# A folder is complete when it has its metadata, which is written last.
if complete := sorted(args.folder.glob("fsdp2-*/.metadata")):
    folder = complete[-1].parent
    progress = torch.load(folder / "progress.pt", weights_only=True)
    model, optimizer = pruner.reshard(shard, progress["pruner"])  # of the saved size
    loaded = sharded_state()
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    start = progress["step"]
for step in range(start, args.steps):
    x, y = draw(train, step * ranks + rank, args.batch)
    nn.functional.cross_entropy(model.train()(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    model, optimizer = pruner.reshard(shard)  # the same ones, unless an event has masked channels
    if (step + 1) % 50 == 0:
        save(args.folder / f"fsdp2-{step + 1:06}", step + 1)
        if rank == 0:
            print(f"step {step + 1}: {pruner.metrics()['macs_share']:.0%} of the MACs")

small = pruner.compact()  # gathered tensor by tensor, by all processes
if rank == 0:
    sparsekern.save(small, args.folder / "fsdp2.safetensors")
    print(
        f"accuracy {accuracy(small, test):.3f} with {sum(p.numel() for p in small.parameters()):,} parameters"
    )
dist.destroy_process_group()
