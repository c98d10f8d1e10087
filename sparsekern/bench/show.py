"""Tables of a report for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sparsekern.bench.compare import Change
from sparsekern.bench.comparison import OURS
from sparsekern.bench.suite import ABSENT, TIMED, WRONG, Report, Result

WIDTH = 160
"""Width of the tables in characters."""


def results_table(report: Report) -> Table:
    """One line for each case: time, noise, memory traffic, and sparsekern's time over the others' times."""
    table = Table(
        title="medians and quartiles; MB: to be moved at least; ours / it: our time over that of beside",
        title_justify="left",
    )
    table.add_column("case", overflow="fold")
    for name in ("ms", "IQR", "MB", "GB/s", "of stream", "beside", "ours / it", "others"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in report.results:
        if result.status == TIMED:
            table.add_row(str(result.case), *_figures(result))
        elif result.status == WRONG:
            table.add_row(str(result.case), Text("WRONG", style="bold red"))
    return table


def _figures(result: Result) -> list[str]:
    seconds = result.seconds[OURS]
    cells = [f"{1e3 * seconds.median:.3f}", f"{(seconds.q3 - seconds.q1) / seconds.median:.0%}"]
    if OURS in result.moved and result.share_of_stream is not None:
        share = result.share_of_stream.median
        cells += [f"{1e-6 * result.moved[OURS]:.2f}", f"{result.gb_per_s[OURS]:.1f}", f"{share:.0%}"]
    else:
        cells += ["-"] * 3
    (beside, ratio), *more = result.over.items()
    cells += [beside, f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f})"]
    return [*cells, ", ".join(f"{name} {spread.median:.3f}" for name, spread in more)]


def notes(report: Report) -> list[str]:
    """The lines below the table: wrong results, absent backends, the stream, environment and duration."""
    lines = [f"WRONG, not timed: {r.case}: {r.reason}" for r in report.results if r.status == WRONG]
    absent: dict[str, list[Result]] = {}
    for result in report.results:
        if result.status == ABSENT:
            absent.setdefault(result.case.backend, []).append(result)
    lines += [
        f"backend {name} does not work here ({found[0].reason}): {len(found)} cases left out"
        for name, found in absent.items()
    ]
    lines += [
        f"stream on the {device}: {s.median:.1f} GB/s ({s.q1:.1f}-{s.q3:.1f}), 4 reads and 3 writes of torch"
        for device, s in report.stream_gb_per_s.items()
    ]
    where = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    timed = sum(result.status == TIMED for result in report.results)
    lines.append(
        f"{where}; {timed} cases, {report.placements} x {report.rounds} rounds, {report.seconds:.0f} s"
    )
    return lines


def changes_table(found: Sequence[Change]) -> Table:
    """One line for each case that both reports contain."""
    table = Table(title="new over old, each divided by the other side of its own run", title_justify="left")
    table.add_column("case", overflow="fold")
    for name in ("old ms", "new ms", "divided by", "new / old", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for change in found:
        verdict = Text("within noise", style="dim")
        if change.regressed:
            verdict = Text("REGRESSED", style="bold red")
        elif change.improved:
            verdict = Text("improved", style="green")
        figures = (f"{change.old:.3f}", f"{change.new:.3f}", change.beside or "-", f"{change.ratio:.3f}")
        table.add_row(change.name, *figures, verdict)
    return table
