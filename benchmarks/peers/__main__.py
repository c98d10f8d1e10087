"""sparsekern beside Torch-Pruning and OTO: the same networks, budget and steps.

``pip install ".[peers]"``, then ``python -m benchmarks.peers``. Three tables:

* Structures: half of the channels of many networks go. Which tool can do it, and are the outputs those of the
  network with zeros in the place of what went?
* Quality: every tool prunes one trained network to the same share of the multiply-adds, and the same steps
  train the results further. Tools that prune while they train get all steps from random weights. The column
  ``as pruned`` is before further training, ``recalibrated`` with batch norms measured again.
* Steps: seconds of an optimizer's step with what a tool adds to it.

Times are medians on one thread; on a busy machine they say nothing (``--no-times``).
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Annotated, Any

import torch
import torch_pruning as tp
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import sparsekern
from benchmarks.environment import environment
from benchmarks.peers.structures import HINTS, TOOLS, Outcome, isolated, networks
from benchmarks.peers.tasks import TASKS, Task
from benchmarks.peers.tools import ONCE, RATE, WHILE, lines_of_code, train
from benchmarks.saved import save
from sparsekern.recipes.measure import latency, macs

CALIBRATION = 16  # batches that tell which channels matter
OTO = "only_train_once"


def structures(only: list[str], limit: int) -> list[Outcome]:
    """The outcomes of all tools on all networks; Torch-Pruning without and with hints where it needs them."""
    found = []
    for name in only or networks():
        for tool in TOOLS:
            found.append(isolated(tool, name, False, limit))
        if name in HINTS:
            found.append(isolated("Torch-Pruning", name, True, limit))
    return found


def quality(name: str, seed: int, keep: float, steps: int, tuning: int) -> Iterator[dict[str, Any]]:
    """One record per way of pruning; all networks of a seed see the same batches."""
    task = TASKS[name](seed)
    torch.manual_seed(seed)
    start = task.make()
    trained = copy.deepcopy(start)
    train(trained, task, range(steps))
    trained.eval()
    later = range(steps, steps + tuning)
    batches = [task.batch(step) for step in range(CALIBRATION)]

    def record(way: str, network: nn.Module, before: nn.Module | None, lines: int) -> dict[str, Any]:
        found = {"task": name, "seed": seed, "way": way, "lines": lines, "network": network.eval()}
        found["macs"] = macs(network, task.example) / macs(trained, task.example)
        found["params"] = sum(p.numel() for p in network.parameters())
        if before is not None:
            found["as_pruned"] = task.quality(before)
            sparsekern.recalibrate(before, [x for x, _ in batches])
            found["recalibrated"] = task.quality(before)
        return {**found, "quality": task.quality(network)}

    dense = copy.deepcopy(trained)
    train(dense, task, later)
    yield record("dense", dense, None, 0)
    for way, once in ONCE.items():
        pruned = once(copy.deepcopy(trained), task, batches, keep)
        tuned = copy.deepcopy(pruned)
        train(tuned, task, later)
        yield record(way, tuned, pruned, lines_of_code(once))
    for way, whole in WHILE.items():
        network = whole(copy.deepcopy(start), task, steps, tuning, keep)
        yield record(way, network, None, lines_of_code(whole))


def steps_table(task: Task, rounds: int) -> dict[str, float | str]:
    """Median seconds of an optimizer's step with what each tool does in it, on the same gradients.

    The first error of a tool stands in the place of its seconds.
    """
    x, y = task.batch(0)

    def prepared() -> nn.Module:
        torch.manual_seed(0)
        model = task.make()
        task.loss(model(x), y).backward()
        return model

    calls: dict[str, Callable[[], object]] = {}
    for label, options in (("torch AdamW", {}), ("torch AdamW, fused", {"fused": True})):
        calls[label] = torch.optim.AdamW(prepared().parameters(), lr=RATE, **options).step
    model = prepared()
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=RATE)
    pruner = sparsekern.Pruner(model, optimizer, task.example, keep=0.5, steps=10**6)
    calls["sparsekern AdamW with a Pruner"] = optimizer.step
    other = prepared()
    importance = tp.importance.GroupMagnitudeImportance()
    for label, kind in (
        ("BNScalePruner", tp.pruner.BNScalePruner),
        ("GroupNormPruner", tp.pruner.GroupNormPruner),
    ):
        regular = kind(other, task.example, importance, ignored_layers=[other.get_submodule(task.head)])
        calls[f"torch AdamW with Torch-Pruning's {label}"] = _regularized(other, regular)
    found: dict[str, float | str] = {}
    for label in list(calls):
        try:
            calls[label]()
        except Exception as error:
            found[label] = f"fails: {type(error).__name__}: {error}"
            del calls[label]
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            begin = perf_counter()
            call()
            times[label].append(perf_counter() - begin)
    pruner.detach()
    return found | {label: statistics.median(values) for label, values in times.items()}


def _regularized(model: nn.Module, pruner: Any) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step() -> None:
        pruner.regularize(model)
        optimizer.step()

    return step


def oto() -> str:
    """Whether OTO works with this torch: its version, or the error of importing it."""
    try:
        version = importlib.metadata.version(OTO)
    except importlib.metadata.PackageNotFoundError:
        return f"{OTO}: not installed"
    try:
        importlib.import_module(OTO)
    except Exception as error:
        return f"{OTO} {version} fails at import with torch {torch.__version__}: {error}"
    return f"{OTO} {version} can be imported with torch {torch.__version__}; it is not measured here"


def structure_table(outcomes: list[Outcome]) -> Table:
    table = Table("network", *TOOLS, "Torch-Pruning with hints", title="Structures")
    for name in dict.fromkeys(outcome.network for outcome in outcomes):
        row = [outcome for outcome in outcomes if outcome.network == name]
        hinted = [f"{o.text}; {o.hints} lines" for o in row if o.hints]
        table.add_row(name, *(o.text for o in row if not o.hints), *(hinted or [""]))
    return table


def quality_table(records: list[dict[str, Any]], timed: dict[tuple[str, str], float]) -> Table:
    """Means over the seeds; the last column has the smallest and the largest."""
    columns = ("task", "way", "lines", "MACs", "as pruned", "recalibrated", "quality", "seeds")
    table = Table(*columns, "ms", title="Quality")
    for key in dict.fromkeys((r["task"], r["way"]) for r in records):
        runs = [r for r in records if (r["task"], r["way"]) == key]

        def mean(name: str, runs: list[dict[str, Any]] = runs) -> str:
            values = [r[name] for r in runs if name in r]
            return f"{statistics.mean(values):.3f}" if values else ""

        found = [r["quality"] for r in runs]
        spread = f"{min(found):.3f} to {max(found):.3f}" if len(runs) > 1 else "1"
        ms = f"{1e3 * timed[key]:.2f}" if key in timed else ""
        cells = [mean(name) for name in ("macs", "as_pruned", "recalibrated", "quality")]
        table.add_row(*key, str(runs[0]["lines"] or ""), *cells, spread, ms)
    return table


def main(
    output: Annotated[str, typer.Option(help="name of the files in benchmarks/results; none to print")] = "",
    task: Annotated[list[str] | None, typer.Option(help="tasks to run; all by default")] = None,
    network: Annotated[list[str] | None, typer.Option(help="structures to try; all by default")] = None,
    seeds: Annotated[int, typer.Option(help="trainings of each task; 0 for the structures alone")] = 1,
    keep: Annotated[float, typer.Option(help="share of the multiply-adds that stays")] = 0.2,
    steps: Annotated[int, typer.Option(help="of the training before pruning")] = 200,
    tuning: Annotated[int, typer.Option(help="steps of the training after it")] = 60,
    of_structures: Annotated[bool, typer.Option("--structures/--no-structures", help="try networks")] = True,
    limit: Annotated[int, typer.Option(help="seconds of processor time for one structure and tool")] = 120,
    times: Annotated[bool, typer.Option(help="time steps and forward passes")] = True,
) -> None:
    """Compare the tools."""
    for given, known, option in ((task, TASKS, "--task"), (network, networks(), "--network")):
        wrong = sorted(set(given or ()) - set(known))
        if wrong:
            raise typer.BadParameter(
                f"got {wrong[0]!r}, expected some of {', '.join(known)}", param_hint=option
            )
    torch.set_num_threads(1)
    console = Console(width=150, record=True)
    outcomes = structures(network or [], limit) if of_structures else []
    if outcomes:
        console.print(structure_table(outcomes))
    records = []
    for name in task or TASKS:
        for seed in range(seeds):
            records += list(quality(name, seed, keep, steps, tuning))
    timed: dict[tuple[str, str], float] = {}
    cost: dict[str, dict[str, float | str]] = {}
    for name in (task or TASKS) if times and seeds else ():
        first = {r["way"]: r["network"] for r in records if r["task"] == name and r["seed"] == 0}
        seconds = latency(first, TASKS[name](0).example)
        timed |= {(name, way): value for way, value in seconds.items()}
        cost[name] = steps_table(TASKS[name](0), rounds=30)
    if records:
        console.print(quality_table(records, timed))
    for name, seconds in cost.items():
        table = Table("step", "ms", title=f"Steps, {name}")
        for label, value in seconds.items():
            table.add_row(label, value if isinstance(value, str) else f"{1e3 * value:.2f}")
        console.print(table)
    console.print(oto(), highlight=False, soft_wrap=True)
    versions = {"torch-pruning": importlib.metadata.version("torch-pruning")}
    settings = {"keep": keep, "steps": steps, "tuning": tuning, "seeds": seeds}
    console.print(environment() | versions | settings)
    if output:
        plain = [{key: value for key, value in record.items() if key != "network"} for record in records]
        found = {"structures": [vars(outcome) for outcome in outcomes], "quality": plain, "oto": oto()}
        found |= {"ms": {f"{a}, {b}": 1e3 * value for (a, b), value in timed.items()}, "step_seconds": cost}
        save(output, console, {"environment": environment() | versions | settings, **found})


if __name__ == "__main__":
    typer.run(main)
