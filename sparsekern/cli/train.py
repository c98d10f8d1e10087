"""The commands that train networks: train, demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.cli.app import (
    ClassesFile,
    Out,
    Quiet,
    Threads,
    app,
    console,
    number_or_text,
    set_quiet,
    set_threads,
)
from sparsekern.cli.config import Config
from sparsekern.cli.options import check_epochs, given, settings_of, steps_of, with_settings
from sparsekern.cli.progress import progress
from sparsekern.recipes.checkpoint import load_backbone
from sparsekern.recipes.classes import ClassTable
from sparsekern.recipes.devices import find_device
from sparsekern.recipes.metrics import import_torchmetrics
from sparsekern.recipes.resume import Saved, check_data, check_settings, open_run
from sparsekern.recipes.run import Result, check_counts, check_out, execute
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import find, load, named, table_of
from sparsekern.report import runs as report
from sparsekern.report.demo import demonstrate

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the runs in --out.")]


@app.command()
@with_settings
def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="DIR/{train,val,test}/{images,masks}/NAME.png, a CSV list (docs/data.md), or "
            "synthetic:vessels, :membranes, :cells, :scenes"
        ),
    ] = None,
    out: Out = Path("run"),
    config: Config = None,
    backbone: Annotated[
        Path | None, typer.Option(help="MobileNetV3: state dict (.pth) of torchvision's weights.")
    ] = None,
    classes_file: ClassesFile = None,
    dense: Annotated[bool, typer.Option("--dense", help="Train without pruning.")] = False,
    epochs: Annotated[
        int | None, typer.Option(help="Instead of --steps: how often every training image is shown.")
    ] = None,
    begin: Annotated[float | None, typer.Option(hidden=True)] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Directory or checkpoint of a run to go on with; its arguments hold. More --steps extend it."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints; 0: at the end; default: at evaluations, and every 2 minutes."
        ),
    ] = None,
    overwrite: Overwrite = False,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop when so many steps are done; --resume goes on.")
    ] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
    **_: Any,
) -> None:
    """Train on a folder of images and masks, prune meanwhile, and store the compact network."""
    import_torchmetrics()  # the scores need it, long after the start
    set_quiet(quiet)
    saved = None if resume is None else open_run(resume)
    arguments = context.params if saved is None else saved.fill(context.params, given(context))
    place = check_data(arguments["data"], saved, "data" in given(context))
    arguments, table = _with_classes(arguments, place)
    settings, out = settings_of(context, arguments), arguments["out"]
    check_epochs(context)
    set_threads(arguments["threads"])
    find_device(settings.device)
    if saved is not None:
        check_settings(settings, saved.settings)
        if epochs is None and _is_finished(saved, settings, out):
            return
    check_counts(arguments["checkpoint_every"], stop_after)
    check_out(out, saved, overwrite)
    weights = None if backbone is None or saved is not None else load_backbone(backbone)
    images = load(place, settings, table)
    settings = replace(settings, steps=steps_of(context, settings, len(images.train)))
    if saved is not None and _is_finished(saved, settings, out):
        return
    for line in (images.summary(place), *images.notes):
        console.print(line, soft_wrap=True)
    if saved is not None:
        console.print(
            f"going on with {saved.path} after step {saved.step} of {settings.steps}", soft_wrap=True
        )
    name = "dense" if settings.keep is None else f"keep {settings.keep:g} of {settings.of}"
    with progress(name, settings.steps) as on_step:
        result = execute(
            settings,
            images,
            out,
            arguments=arguments,
            backbone=weights,
            resume=saved,
            checkpoint_every=arguments["checkpoint_every"],
            overwrite=overwrite,
            stop_after=stop_after,
            on_step=on_step,
        )
    if result is None:
        console.print(f"stopped; go on with --resume {out}", soft_wrap=True)
        return
    report.curves(out / "curves.png", {name: result})
    console.print(report.run_table(result))
    console.print(report.class_table(result))
    _print_verified(result)
    console.print(f"results in {out}", soft_wrap=True)


def _is_finished(saved: Saved, settings: Settings, out: Path) -> bool:
    """Whether a run is complete in its own directory `out`; prints a line if it is."""
    if not saved.concluded(settings.steps) or out != saved.folder:
        return False
    console.print(f"{out} is finished after {settings.steps} steps; more --steps extend it", soft_wrap=True)
    return True


def _with_classes(arguments: Mapping[str, Any], data: Path) -> tuple[dict[str, Any], ClassTable | None]:
    """The arguments with a number of classes (as given, of the data, or the default), and the class table."""
    kind, table = find(str(data)), table_of(data, arguments["classes_file"])
    named_by = kind or table
    count = Settings.classes if named_by is None else len(named_by.names)
    return {**arguments, "classes": count if arguments["classes"] is None else arguments["classes"]}, table


@app.command()
def demo(
    context: typer.Context,
    out: Out = Path("demo"),
    keep: Annotated[float, typer.Option(help="Share of the MACs that stays.")] = 0.2,
    width: Annotated[int, typer.Option(help="First channels of the UNet.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 600,
    data: Annotated[
        str, typer.Option(help="synthetic:cells, :vessels, :membranes, :scenes")
    ] = "synthetic:cells",
    images: Annotated[int, typer.Option(help="Generated training images.")] = 192,
    round_to: Annotated[
        str, typer.Option(help="Channel counts become multiples of it; a number or auto.")
    ] = "8",
    seed: Annotated[int, typer.Option(help="Of images, weights, order and augmentation.")] = 0,
    overwrite: Overwrite = False,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Train a UNet on generated images twice, dense and pruned to 20 % of its MACs; compare."""
    import_torchmetrics()
    kind = named(data)
    settings = Settings(
        classes=kind.classes,
        width=width,
        keep=keep,
        round_to=number_or_text(round_to),
        steps=steps,
        batch=4,
        crop=96,
        lr=2e-3,
        seed=seed,
        evaluations=6,
    )
    set_quiet(quiet)
    set_threads(threads)
    table, pruned = demonstrate(
        settings,
        images,
        out,
        arguments=context.params,
        progress=progress,
        kind=kind,
        overwrite=overwrite,
    )
    console.print(table)
    _print_verified(pruned)
    console.print(f"pictures, networks and figures in {out}", soft_wrap=True)


def _print_verified(result: Result) -> None:
    if "difference" in result.figures:
        console.print(
            f"compact equals masked to {result.figures['difference']:.1e} of the output's scale (float64)"
        )
