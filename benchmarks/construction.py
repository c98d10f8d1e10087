"""Time and memory of ``Pruner(...)``: ``python -m benchmarks.construction``.

Each network is built in a process of its own, so that the peak of one does not hide that of the next.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.networks import NETWORKS, example

CASES = ("unet-31m", "resnet50", "mobilenetv3-seg")


def measure(name: str) -> tuple[float, float]:
    """Construct in this process; returns the seconds and the growth of the process's peak memory in MiB."""
    import sparsekern

    model = NETWORKS[name]()
    optimizer = sparsekern.optim.AdamW(model.parameters())
    inputs = example(name, size=224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    sparsekern.Pruner(model, optimizer, inputs, keep=0.2, steps=1000)
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print the table of all cases."""
    table = Table("network", "seconds", "MiB above the model")
    for name in CASES:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.construction", name],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, memory = map(float, child.stdout.split())
        table.add_row(name, f"{seconds:.2f}", f"{memory:.0f}")
    console = Console()
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1]))
    else:
        main()
