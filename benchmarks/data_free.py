"""Widths after pruning by weights alone: the share of each group's channels that stays.

``python -m benchmarks.data_free [--keep 0.5]`` takes seconds and needs torchvision. Weights are the initial
ones. Their norms hardly differ between layers, so the widths show how the allocator uses costs alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torchvision import models

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchvision
from sparsekern.prune.decide import allocate, criteria
from sparsekern.prune.once import task_of
from sparsekern.prune.state.statistics import weight_statistics
from sparsekern.recipes.models import UNet

ALLOCATORS = {
    "balance 0.25": allocate.Global(),
    "balance 0.75": allocate.WITHOUT_DATA,
    "uniform": allocate.Uniform(),
}


def networks() -> dict[str, tuple[nn.Module, int]]:
    """By name, each network and the height and width of its images."""
    return {
        "resnet18": (models.resnet18(), 224),
        "resnet50": (models.resnet50(), 224),
        "mobilenet_v3_small": (models.mobilenet_v3_small(), 224),
        "vgg11_bn": (models.vgg11_bn(), 224),
        "UNet(width=16)": (UNet(3, 1, width=16, depth=4), 128),
    }


def main() -> None:
    """Print a line per network and allocator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.5)
    keep = parser.parse_args().keep
    torch.manual_seed(0)
    print(f"{'network':20}{'allocator':14}{'first':>8}{'least':>8}{'median':>8}{'largest':>8}")
    for name, (model, size) in networks().items():
        task = task_of(model.eval(), torch.zeros(1, 3, size, size), keep=keep, of="macs", round_to=1)
        saliency = criteria.Magnitude()(weight_statistics(model, task.graph))
        for label, allocator in ALLOCATORS.items():
            kept = allocator(replace(task, saliency=saliency))
            shares = [float(kept[group.channels].mean()) for group in task.graph.groups]
            figures = (shares[0], min(shares), float(np.median(shares)), max(shares))
            print(f"{name:20}{label:14}" + "".join(f"{figure:8.2f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
