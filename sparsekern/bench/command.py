"""The implementation of ``sparsekern bench``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sparsekern.bench import compare, show
from sparsekern.bench.cases import Case, select
from sparsekern.bench.suite import WRONG, Report, Suite
from sparsekern.files.atomic import replacing

# Numbers of memory placements of the tensors, and of timed rounds for each placement.
PLACEMENTS, ROUNDS = 4, 4
QUICK_PLACEMENTS, QUICK_ROUNDS = 3, 2

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Arguments:
    """Arguments of the command, with the names of its options."""

    quick: bool = False
    json: str | None = None
    compare: Path | None = None
    filter: str = ""
    plot: Path | None = None
    rounds: int | None = None
    fail_above: float | None = None


def bench(arguments: Arguments, out: Console, progress_on: Console) -> int:
    """Run the cases, then print and write the requested results.

    Args:
        arguments: arguments of the command.
        out: console for the tables.
        progress_on: console for the progress bar.

    Returns:
        The exit code: 1 if a result is wrong, or if a case takes more than ``fail_above`` times as long as in
        ``compare``, beyond noise; else 0.

    Raises:
        ValueError: an argument is out of range; nothing is measured.
        OSError: a file cannot be read or written.
    """
    cases = _checked(arguments)
    old = None if arguments.compare is None else compare.read(arguments.compare)
    report = _run(_suite(arguments), cases, progress_on)
    out.print(show.results_table(report))
    for line in show.notes(report):
        out.print(line, soft_wrap=True)
    new = report.plain()
    _write(new, arguments.json)
    if arguments.plot is not None:
        from sparsekern.bench import roofline  # matplotlib takes a second to import

        roofline.draw(report, arguments.plot)
    code = int(any(result.status == WRONG for result in report.results))
    if old is None:
        return code
    found = compare.changes(new, old)
    out.print(show.changes_table(found))
    for line in compare.elsewhere(new, old):
        out.print(f"not measured alike: {line}", soft_wrap=True)
    limit = arguments.fail_above
    failed = limit is not None and any(change.regressed and change.ratio > limit for change in found)
    return int(code or failed)


def _suite(arguments: Arguments) -> Suite:
    placements, rounds = (QUICK_PLACEMENTS, QUICK_ROUNDS) if arguments.quick else (PLACEMENTS, ROUNDS)
    return Suite(placements, rounds if arguments.rounds is None else arguments.rounds)


def _checked(arguments: Arguments) -> list[Case]:
    """Check all arguments and select the cases.

    Raises:
        ValueError: an argument is out of range.
        OSError: an output file cannot be created.
    """
    if arguments.rounds is not None and arguments.rounds < 1:
        raise ValueError(f"--rounds: got {arguments.rounds}, expected 1 or more")
    if arguments.fail_above is not None:
        if arguments.compare is None:
            raise ValueError(f"--fail-above: got {arguments.fail_above:g} without --compare, expected both")
        if not arguments.fail_above >= 1:
            raise ValueError(f"--fail-above: got {arguments.fail_above:g}, expected a number of 1 or more")
    file = None if arguments.json in (None, "-") else Path(str(arguments.json))
    for name, path in (("--json", file), ("--plot", arguments.plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise OSError(f"{name}: got {path}, expected a file name in a directory that exists")
    if arguments.plot is not None and arguments.plot.suffix not in PICTURES:
        raise ValueError(
            f"--plot: got {arguments.plot}, expected a name that ends in {' or '.join(PICTURES)}"
        )
    return select(arguments.filter, quick=arguments.quick)


def _run(suite: Suite, cases: list[Case], console: Console) -> Report:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))

        def on_case(case: Case) -> None:
            done = progress.tasks[0].description != ""
            progress.update(task, advance=int(done), description=str(case))

        return suite.run(cases, on_case)


def _write(report: dict[str, object], target: str | None) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        with replacing(target, "--json") as temporary:
            temporary.write_text(text)
