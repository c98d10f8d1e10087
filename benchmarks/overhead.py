"""What a step costs beside its kernels: ``python -m benchmarks.overhead`` steps 174 tensors of 4 elements."""

from __future__ import annotations

import statistics
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsekern
from benchmarks.environment import environment
from sparsekern._rows import RowTable

TENSORS, ELEMENTS, STEPS = 174, 4, 500


def microseconds(make: type[torch.optim.Optimizer], rows: bool, **options: object) -> float:
    """Median of a step, with or without a row table attached."""
    params = [nn.Parameter(torch.ones(ELEMENTS)) for _ in range(TENSORS)]
    for param in params:
        param.grad = torch.ones(ELEMENTS)
    optimizer = make(params, **options)
    if rows:
        table = RowTable([(param, 0) for param in params], [np.arange(ELEMENTS)])
        sparsekern.optim.attach(optimizer, table)
    times = []
    for _ in range(STEPS):
        begin = perf_counter()
        optimizer.step()
        times.append(perf_counter() - begin)
    return statistics.median(times) * 1e6


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    table = Table("optimizer", "microseconds a step")
    table.add_row("torch AdamW(fused=True)", f"{microseconds(torch.optim.AdamW, False, fused=True):.0f}")
    for name in ("SGD", "Adam", "AdamW"):
        ours = getattr(sparsekern.optim, name)
        table.add_row(f"sparsekern {name}", f"{microseconds(ours, False):.0f}")
        table.add_row(f"sparsekern {name} with rows", f"{microseconds(ours, True):.0f}")
    console = Console()
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    main()
