"""Data parallel: all processes prune alike, and what they exchange gets smaller with the network.

torchrun --nproc-per-node 2 examples/ddp.py --steps 300 --keep 0.2
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
from common import accuracy, draw, gratings, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
model = DistributedDataParallel(network())
optimizer = sparsekern.optim.AdamW(model.parameters(), lr=2e-3)
example = train[:1][0]
pruner = sparsekern.Pruner(model, optimizer, example, keep=args.keep, steps=args.steps, shrink=True)

checkpoint = args.folder / "ddp.pt"
start = pruner.load_checkpoint(checkpoint)["step"] if checkpoint.exists() else 0
for step in range(start, args.steps):
    x, y = draw(train, step * ranks + rank, args.batch)
    nn.functional.cross_entropy(model.train()(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % 50 == 0:
        pruner.save_checkpoint(checkpoint, step=step + 1)  # all call it, the first one writes
        if rank == 0:
            print(f"step {step + 1}: {pruner.metrics()['macs_share']:.0%} of the MACs")

if rank == 0:
    small = pruner.compact()
    sparsekern.save(small, args.folder / "ddp.safetensors")
    print(
        f"accuracy {accuracy(small, test):.3f} with {sum(p.numel() for p in small.parameters()):,} parameters"
    )
# The group's threads end with the last object that uses the group. A process aborts if one of them still
# holds a tensor while the interpreter ends.
del pruner, optimizer, model
gc.collect()
dist.destroy_process_group()
