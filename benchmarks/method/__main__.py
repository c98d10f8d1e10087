"""Trainings that measure the value of pruning, and tables of their results.

    python -m benchmarks.method --tune --data DIR    # learning rates, on seeds that the study does not use
    python -m benchmarks.method --screen --data DIR  # variants of the default, on the same seeds
    python -m benchmarks.method --data DIR           # the study: runs what is not there yet; takes hours
    python -m benchmarks.method --latency            # times the networks of the study; on a quiet machine
    python -m benchmarks.method --report             # writes method.md and .png from the files of the others

Every training is one line of ``benchmarks/results/method.jsonl``, or of ``method-tuning.jsonl`` for the first
two. A run can be stopped and goes on where it was. Arms, sets with their learning rates, networks and the
order of the queue are data in ``arms.py``, ``sets.py`` and ``runs.py``. A line counts as done only if the
arm's criterion, allocator and the training are the same as now.
"""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.environment import environment
from benchmarks.method import lines, tables, tuning_tables
from benchmarks.method.arms import ARMS
from benchmarks.method.figure import draw
from benchmarks.method.latency import measure
from benchmarks.method.runs import MODELS, STAGES, Study, current, queue
from benchmarks.method.sets import find_sets
from benchmarks.method.tuning import FURTHER, SCREENED, SEEDS, TUNED, screening, tuning
from sparsekern.files.atomic import replacing

RESULTS = Path(__file__).parents[1] / "results" / "method.jsonl"
console = Console(stderr=True, highlight=False)


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of dsb2018, {train,test}/{images,masks}; else generated sets alone."),
    ] = None,
    results: Annotated[Path, typer.Option(help="The lines; the report lies beside them.")] = RESULTS,
    report: Annotated[bool, typer.Option("--report", help="Write the tables; train nothing.")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Time the networks; train nothing.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Try learning rates, on seeds of their own.")] = False,
    screen: Annotated[bool, typer.Option("--screen", help="Try variants of the default.")] = False,
    model: Annotated[str, typer.Option(help="unet, mobilenetv3; all stages of the queue if not given.")] = "",
    sets: Annotated[str, typer.Option(help="Only these, by commas.")] = "",
    arms: Annotated[str, typer.Option(help="Only these, by commas.")] = "",
    keep: Annotated[float | None, typer.Option(help="Only this share of the MACs.")] = None,
    seeds: Annotated[int, typer.Option(help="How many.")] = 6,
    limit: Annotated[int | None, typer.Option(help="Stop after so many trainings.")] = None,
) -> None:
    """Run the queue, or report what has been run."""
    if report:
        try:
            _report(results)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return
    torch.set_num_threads(1)
    if latency:
        record = {"environment": environment(), "times": measure(current(lines.read(results)))}
        with replacing(_times_of(results)) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
        return
    found = find_sets(data)
    chosen = _chosen("--sets", sets, list(found))
    study = Study(_tuning_of(results) if tune or screen else results, found, environment())
    if tune:
        network = _chosen("--model", model, list(TUNED))[0]
        runs = tuning(study, chosen, _chosen("--arms", arms, list(TUNED[network].arms)), network)
    elif screen:
        runs = screening(chosen, _chosen("--arms", arms, list(SCREENED)), (*SEEDS, *FURTHER)[:seeds])
    else:
        names, models = _chosen("--arms", arms, list(ARMS)), _chosen("--model", model, list(MODELS))
        stages = [
            replace(stage, arms=[arm for arm in stage.arms if arm in names])
            for stage in STAGES
            if stage.model in models and keep in (None, stage.keep)
        ]
        runs = queue(chosen, stages, range(seeds))
    left, failed = limit, 0
    for run in runs:
        if left == 0:
            break
        if study.done(run) is not None:
            continue
        begin = time.perf_counter()
        left = None if left is None else left - 1
        try:
            record = study.execute(run)
        except Exception:
            # One training that fails must not end a queue of hours.
            failed += 1
            console.print(f"{run} failed:\n{traceback.format_exc()}", markup=False)
            continue
        console.print(
            f"{run.model} {run.set} keep {run.keep:g} seed {run.seed} {run.arm} "
            f"lr {study.settings(run).lr:g}: Dice {record['dice']:.4f}, "
            f"averaged {record['averaged_dice']:.4f}, {time.perf_counter() - begin:.0f} s"
        )
    if failed:
        console.print(f"{failed} trainings failed; the same command tries them again")
        raise typer.Exit(1)


def _report(results: Path) -> None:
    """Write the tables beside the lines, and their picture where a UNet has trained at two budgets.

    Raises:
        ValueError: there is no line of the study as it is now.
    """
    records = lines.read(results)
    now = current(records)
    older = [r for r in records if r["model"] == "unet" and r["training"]["lr"] == MODELS["unet"].lr]
    # Where this rate is the chosen one, a set has more seeds of an arm than the others.
    trained = {(r["arm"], r["seed"], r["set"]) for r in older}
    sets = {name for _, _, name in trained}
    older = [r for r in older if all((r["arm"], r["seed"], name) in trained for name in sets)]
    if all(any(r is one for one in now) for r in older):
        older = []
    tuned = tuning_tables.report(lines.read(_tuning_of(results)))
    picture = results.with_suffix(".png")
    budgets = tables.unets(now)
    text = tables.report(now, _times(results), older, tuned, picture.name)
    if len(budgets) > 1:
        draw(budgets, picture)
    with replacing(results.with_suffix(".md")) as temporary:
        temporary.write_text(text)


def _tuning_of(results: Path) -> Path:
    return results.with_name(f"{results.stem}-tuning.jsonl")


def _times_of(results: Path) -> Path:
    return results.with_name(f"{results.stem}-latency.json")


def _times(results: Path) -> dict[str, Any] | None:
    """What `--latency` has written beside `results`, if it has."""
    path = _times_of(results)
    return json.loads(path.read_text()) if path.exists() else None


def _chosen(name: str, text: str, known: list[str]) -> list[str]:
    chosen = text.split(",") if text else known
    for one in chosen:
        if one not in known:
            raise typer.BadParameter(f"{name}: got {one!r}, expected some of {', '.join(known)}")
    return chosen


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
