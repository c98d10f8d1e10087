"""Random networks, traced, half pruned, compared and priced: ``python -m benchmarks.fuzz --count 2000``.

Each is composed of a few structures of ``tests/graph/random_*.py``. The outcomes are:

* exact: masked and compact networks agree in both modes, and cost what was predicted;
* whole: the same, but nothing could be removed;
* refused: ``trace`` raised a ValueError that names ``model`` or ``example_inputs``;
* DIFFERENT: outputs or costs are not those predicted; CRASH: anything else was raised.

The last two are printed with the seed and the structures, and make the exit code 1.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from graph.random_check import examine
from graph.random_networks import random_plan

OUTCOMES = ("exact", "whole", "refused", "DIFFERENT", "CRASH")


def main(
    count: Annotated[int, typer.Option(help="How many networks.")] = 2000,
    start: Annotated[int, typer.Option(help="First seed.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after that long.")] = float("inf"),
    only: Annotated[list[str] | None, typer.Option(help="Structures to compose; default all.")] = None,
    text: Annotated[Path | None, typer.Option(help="File for what is printed.")] = None,
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    consoles = [Console(), *([Console(file=text.open("w", buffering=1), width=110)] if text else [])]
    outcomes: Counter[str] = Counter()
    structures: dict[str, Counter[str]] = {}
    begin = time.perf_counter()
    channels = 0
    for seed in track(range(start, start + count), console=Console(stderr=True)):
        if time.perf_counter() - begin > 60 * minutes:
            break
        plan = random_plan(seed, only or ())
        try:
            outcome, said, found = examine(plan)
        except Exception:
            outcome, said, found = "CRASH", traceback.format_exc(limit=-3), 0
        outcomes[outcome] += 1
        channels += found
        for name, _ in plan.steps:
            structures.setdefault(name, Counter())[outcome] += 1
        if outcome in ("DIFFERENT", "CRASH", "refused"):
            for console in consoles:
                console.print(f"seed {seed}: {outcome}: {said}\n  {plan}", highlight=False)
    for console in consoles:
        console.print(
            ", ".join(
                f"{outcomes[name]} {name}" for name in ("exact", "whole", "refused", "DIFFERENT", "CRASH")
            )
        )
        console.print(
            f"{outcomes.total()} networks of {len(structures)} structures, {channels} channels found"
        )
        console.print(f"seeds {start} to {start + outcomes.total() - 1}, {time.perf_counter() - begin:.0f} s")
        console.print(environment())
    if outcomes["DIFFERENT"] or outcomes["CRASH"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
