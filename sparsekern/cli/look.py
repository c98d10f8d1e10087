"""Commands that report on the installation, a network, or the speed of the kernels: info, inspect, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sparsekern import info as _info
from sparsekern.cli.app import Threads, app, console, number_or_text, set_threads


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the ISA chosen, the backends that work and why others do not, torch, CUDA, Triton."""
    found = _info.collect()
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _info.lines(found):
        table.add_row(name, value)
    console.print(table)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="module:factory, such as torchvision.models:resnet18")],
    inputs: Annotated[
        list[str], typer.Option("--input", help="Sizes of an input, 1,3,224,224 or 1,128:int64; in order.")
    ],
    keep: Annotated[float | None, typer.Option(help="Plan for this share of the cost, in (0, 1].")] = None,
    of: Annotated[str, typer.Option(help="The cost: macs, params, latency")] = "macs",
    runtime: Annotated[
        str, typer.Option(help="Where latency is measured: torch, compile, onnxruntime, openvino")
    ] = "torch",
    round_to: Annotated[
        str, typer.Option(help="Channel counts become multiples of it; a number or auto.")
    ] = "1",
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the groups.")] = None,
    png: Annotated[Path | None, typer.Option(help="The same as PNG; needs matplotlib.")] = None,
    threads: Threads = 0,
) -> None:
    """Show what of a network can be pruned: its groups, what they cost, and a plan by their weights."""
    from sparsekern.graph import trace
    from sparsekern.prune.decide.criteria import Magnitude
    from sparsekern.prune.state.statistics import weight_statistics
    from sparsekern.report import picture, tables
    from sparsekern.report.inspect import find_model, make_input, plan_by_weights

    set_threads(threads)
    example = tuple(make_input(spec) for spec in inputs)
    for path in (svg, png):
        if path is not None and not path.parent.is_dir():
            raise OSError(f"{path}: its directory does not exist, expected one to write to")
    model = find_model(target)
    kept = None
    if keep is None:
        graph = trace(model, example)
    else:
        graph, kept = plan_by_weights(
            model, example, keep=keep, of=of, runtime=runtime, round_to=number_or_text(round_to)
        )
    console.print(str(graph), soft_wrap=True)
    saliency = Magnitude()(weight_statistics(model, graph))
    console.print(tables.sensitivity_table(tables.sensitivities(graph, saliency), "magnitude"))
    if kept is not None:
        console.print(tables.kept_table(graph, kept, f"Kept at {keep:.0%} of {of}, by magnitude"))
    page = picture.draw(graph, kept)
    if svg is not None:
        picture.write_svg(page, svg)
    if png is not None:
        picture.write_png(page, png)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A short selection, in less than a minute.")] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", help="Write all figures; - prints them, tables go to stderr.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Ratios to what --json has written before; which got slower.")
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option(help="Exit code 1 where a case takes so many times as long, beyond noise.")
    ] = None,
    pattern: Annotated[
        str, typer.Option("--filter", help="A regular expression in the names of the cases.")
    ] = "",
    plot: Annotated[Path | None, typer.Option(help="Write the roofline as PNG; needs matplotlib.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timings for each of 4 placements in memory (4); --quick: of 3 (2).")
    ] = None,
    threads: Threads = 0,
) -> int:
    """Time the fused ops, steps and training iterations beside torch's; wrong results are not timed."""
    from sparsekern.bench import command, show

    set_threads(threads)
    arguments = command.Arguments(quick, as_json, compare, pattern, plot, rounds, fail_above)
    errors = Console(stderr=True, highlight=False)
    out = Console(stderr=as_json == "-", highlight=False)
    if not out.is_terminal:
        out.width = show.WIDTH
    return command.bench(arguments, out, errors)
