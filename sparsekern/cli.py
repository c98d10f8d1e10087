"""The command line: demo, train, inspect, bench, info. Bad input: one line on stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import _info

if TYPE_CHECKING:
    from .recipes.run import Result
    from .recipes.settings import Settings
    from .recipes.train import Step

app = typer.Typer(
    name="sparsekern",
    help="Channel pruning while training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

Threads = Annotated[int, typer.Option(help="CPU threads; 0 for torch's choice.")]
Out = Annotated[Path, typer.Option(help="Directory of the results.")]


def run(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit code."""
    try:
        code = app(args=list(arguments), prog_name="sparsekern", standalone_mode=False)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except typer.Abort:
        return _fail("stopped", 130)
    except Exception as error:
        # Whatever the parser of typer raises, under its own or click's name.
        if not hasattr(error, "format_message"):
            raise
        return _fail(error.format_message())
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


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
    round_to: Annotated[
        str, typer.Option(help="Channel counts become multiples of it; a number or auto.")
    ] = "1",
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the groups.")] = None,
    png: Annotated[Path | None, typer.Option(help="The same as PNG; needs matplotlib.")] = None,
    threads: Threads = 0,
) -> None:
    """Show what of a network can be pruned: its groups, what they cost, and a plan by their weights."""
    from .graph import trace
    from .prune.criteria import Magnitude
    from .prune.statistics import of_weights
    from .report import picture, tables
    from .report.inspect import find_model, make_input, plan_by_weights

    _set_threads(threads)
    example = tuple(make_input(spec) for spec in inputs)
    for path in (svg, png):
        if path is not None and not path.parent.is_dir():
            raise OSError(f"{path}: its directory does not exist, expected one to write to")
    model = find_model(target)
    kept = None
    if keep is None:
        graph = trace(model, example)
    else:
        graph, kept = plan_by_weights(model, example, keep=keep, of=of, round_to=_round_to(round_to))
    console.print(str(graph), soft_wrap=True)
    saliency = Magnitude()(of_weights(model, graph))
    console.print(tables.sensitivity_table(tables.sensitivities(graph, saliency), "magnitude"))
    if kept is not None:
        console.print(tables.kept_table(graph, kept, f"Kept at {keep:.0%} of {of}, by magnitude"))
    page = picture.draw(graph, kept)
    if svg is not None:
        picture.write_svg(page, svg)
    if png is not None:
        picture.write_png(page, png)


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Option(
            help="DIR/{train,test}/{images,masks}/NAME.png, or synthetic:vessels, :membranes, :cells."
        ),
    ],
    out: Out = Path("run"),
    model: Annotated[str, typer.Option(help="unet, mobilenetv3, mobilenetv3-small")] = "unet",
    width: Annotated[
        float | None, typer.Option(help="UNet: first channels (32); MobileNetV3: factor (1).")
    ] = None,
    depth: Annotated[int, typer.Option(help="UNet: number of poolings.")] = 4,
    decoder: Annotated[str, typer.Option(help="UNet: transposed, bilinear")] = "transposed",
    backbone: Annotated[
        Path | None, typer.Option(help="MobileNetV3: state dict (.pth) of torchvision's weights.")
    ] = None,
    classes: Annotated[int, typer.Option(help="Classes of the masks with the background.")] = 2,
    keep: Annotated[
        float | None, typer.Option(help="Share of the cost that stays, in (0, 1]; default 0.2.")
    ] = None,
    of: Annotated[str, typer.Option(help="The cost: macs, params, latency")] = "macs",
    dense: Annotated[bool, typer.Option("--dense", help="Train without pruning.")] = False,
    select: Annotated[
        str,
        typer.Option(
            help="Which channels go: joint, taylor, gradient-count, magnitude, redundancy, random, "
            "shuffled; combined by * and +."
        ),
    ] = "joint",
    allocate: Annotated[str, typer.Option(help="How wide layers stay: global, uniform, flat")] = "global",
    round_to: Annotated[
        str | None,
        typer.Option(help="Channel counts become multiples of it; a number (1) or auto (with --shrink)."),
    ] = None,
    min_channels: Annotated[int, typer.Option(help="Every layer keeps so many.")] = 1,
    begin: Annotated[float, typer.Option(help="Share of the steps before the first channel goes.")] = 0.1,
    finish: Annotated[float, typer.Option(help="Share of the steps by which the budget is met.")] = 0.6,
    events: Annotated[int, typer.Option(help="How many times channels go.")] = 10,
    shrink: Annotated[
        bool, typer.Option(help="Make the network smaller during the training, which gets cheaper by it.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 8,
    crop: Annotated[int, typer.Option(help="Pixels an edge that a step sees of an image.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-2,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which lr rises.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    evaluations: Annotated[int, typer.Option(help="How often the test images are scored.")] = 5,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0 for one at the end.")
    ] = 0,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop when so many steps are done; --resume goes on.")
    ] = None,
    threads: Threads = 0,
) -> None:
    """Train on a folder of images and masks, prune meanwhile, and store the compact network."""
    from .recipes.checkpoint import load_backbone
    from .recipes.files import writable_directory
    from .recipes.run import execute
    from .recipes.synthetic import load
    from .report import runs as report

    settings = _settings(context.params)
    _set_threads(threads)
    writable_directory(out, "--out")
    weights = None if backbone is None else load_backbone(backbone)
    train_split, test_split = load(data, classes, crop)
    console.print(f"{len(train_split)} training and {len(test_split)} test images in {data}")
    name = "dense" if settings.keep is None else f"keep {settings.keep:g} of {of}"
    with _progress(name, steps) as on_step:
        result = execute(
            settings,
            train_split,
            test_split,
            out,
            arguments=context.params,
            backbone=weights,
            resume=resume,
            checkpoint_every=checkpoint_every,
            stop_after=stop_after,
            on_step=on_step,
        )
    if result is None:
        console.print(f"stopped; go on with --resume {out / 'checkpoint.pt'}")
        return
    report.curves(out / "curves.png", {name: result})
    console.print(report.run_table(result))
    _print_verified(result)
    console.print(f"results in {out}")


@app.command()
def demo(
    context: typer.Context,
    out: Out = Path("demo"),
    keep: Annotated[float, typer.Option(help="Share of the MACs that stays.")] = 0.2,
    width: Annotated[int, typer.Option(help="First channels of the UNet.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 600,
    data: Annotated[str, typer.Option(help="synthetic:cells, :vessels, :membranes")] = "synthetic:cells",
    images: Annotated[int, typer.Option(help="Generated training images.")] = 192,
    round_to: Annotated[
        str, typer.Option(help="Channel counts become multiples of it; a number or auto.")
    ] = "8",
    seed: Annotated[int, typer.Option(help="Of images, weights, order and augmentation.")] = 0,
    threads: Threads = 0,
) -> None:
    """Train a UNet on generated images twice, dense and pruned to 20 % of its MACs; compare."""
    from .demo import demonstrate
    from .recipes.settings import Settings
    from .recipes.synthetic import named

    kind = named(data)
    settings = Settings(
        classes=kind.classes,
        width=width,
        keep=keep,
        round_to=_round_to(round_to),
        steps=steps,
        batch=4,
        crop=96,
        lr=2e-3,
        seed=seed,
        evaluations=6,
    )
    _set_threads(threads)
    table, pruned = demonstrate(
        settings, images, out, arguments=context.params, progress=_progress, kind=kind
    )
    console.print(table)
    _print_verified(pruned)
    console.print(f"pictures, networks and figures in {out}")


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
    from .bench import command, show

    _set_threads(threads)
    arguments = command.Arguments(quick, as_json, compare, pattern, plot, rounds, fail_above)
    errors = Console(stderr=True, highlight=False)
    out = Console(stderr=as_json == "-", highlight=False)
    if not out.is_terminal:
        out.width = show.WIDTH
    return command.bench(arguments, out, errors)


def _settings(parameters: Mapping[str, Any]) -> Settings:
    from .recipes.errors import InputError
    from .recipes.settings import Settings

    values = {field.name: parameters[field.name] for field in fields(Settings)}
    if parameters["dense"]:
        if values["keep"] is not None:
            raise InputError(f"--keep: got {values['keep']} with --dense, expected one of the two")
        if values["shrink"]:
            raise InputError("--shrink: got it with --dense, expected one of the two")
    elif values["keep"] is None:
        values["keep"] = 0.2
    if values["round_to"] is not None:
        values["round_to"] = _round_to(values["round_to"])
    return Settings(**values)


def _round_to(text: str) -> int | str:
    """Numbers as numbers; what else is allowed, the pruner knows."""
    return int(text) if text.isdecimal() else text


def _set_threads(threads: int) -> None:
    if threads < 0:
        raise ValueError(f"--threads: got {threads}, expected 0 or more")
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def _progress(name: str, steps: int) -> Iterator[Callable[[Step], None]]:
    """A progress bar, moved on by the callback that the block gets."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  MACs {task.fields[share]:4.0%}"),
        TextColumn("{task.fields[dice]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, loss=float("nan"), share=1.0, dice="")

        def on_step(step: Step) -> None:
            dice = "" if step.scores is None else f"Dice {step.scores.dice:.3f}"
            progress.update(task, completed=step.step, loss=step.loss, share=step.macs_share, dice=dice)

        yield on_step


def _print_verified(result: Result) -> None:
    if "difference" in result.figures:
        console.print(
            f"compact equals masked to {result.figures['difference']:.1e} of the output's scale (float64)"
        )
