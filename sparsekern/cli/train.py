"""Commands that train: train, demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.cli.app import Out, Quiet, Threads, app, console, number_or_text, set_quiet, set_threads
from sparsekern.cli.config import Config
from sparsekern.cli.options import check_epochs, settings_of, steps_of, with_settings
from sparsekern.cli.progress import progress
from sparsekern.demo import demonstrate
from sparsekern.recipes.checkpoint import load_backbone
from sparsekern.recipes.data import load_folder
from sparsekern.recipes.devices import find_device
from sparsekern.recipes.files import writable_directory
from sparsekern.recipes.run import Result, execute
from sparsekern.recipes.settings import Settings
from sparsekern.report import runs as report


@app.command()
@with_settings
def train(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="DIR/{train,test}/{images,masks}/NAME.png")],
    out: Out = Path("run"),
    config: Config = None,
    backbone: Annotated[
        Path | None, typer.Option(help="MobileNetV3: state dict (.pth) of torchvision's weights.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Train without pruning.")] = False,
    epochs: Annotated[
        int | None, typer.Option(help="Instead of --steps: how often every training image is shown.")
    ] = None,
    begin: Annotated[float | None, typer.Option(hidden=True)] = None,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from.")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0 for one at the end.")
    ] = 0,
    stop_after: Annotated[
        int | None, typer.Option(help="Stop when so many steps are done; --resume goes on.")
    ] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
    **_: Any,
) -> None:
    """Train on a folder of images and masks, prune meanwhile, and store the compact network."""
    settings = settings_of(context)
    check_epochs(context)
    set_quiet(quiet)
    set_threads(threads)
    find_device(settings.device)
    writable_directory(out, "--out")
    weights = None if backbone is None else load_backbone(backbone)
    train_split, test_split = load_folder(data, settings.classes)
    settings = replace(settings, steps=steps_of(context, settings, len(train_split)))
    console.print(f"{len(train_split)} training and {len(test_split)} test images in {data}", soft_wrap=True)
    name = "dense" if settings.keep is None else f"keep {settings.keep:g} of {settings.of}"
    with progress(name, settings.steps) as on_step:
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
        console.print(f"stopped; go on with --resume {out / 'checkpoint.pt'}", soft_wrap=True)
        return
    report.curves(out / "curves.png", {name: result})
    console.print(report.run_table(result))
    _print_verified(result)
    console.print(f"results in {out}", soft_wrap=True)


@app.command()
def demo(
    context: typer.Context,
    out: Out = Path("demo"),
    keep: Annotated[float, typer.Option(help="Share of the MACs that stays.")] = 0.2,
    width: Annotated[int, typer.Option(help="First channels of the UNet.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 600,
    images: Annotated[int, typer.Option(help="Generated training images.")] = 192,
    round_to: Annotated[
        str, typer.Option(help="Channel counts become multiples of it; a number or auto.")
    ] = "8",
    seed: Annotated[int, typer.Option(help="Of images, weights, order and augmentation.")] = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Train a UNet on generated microscopy twice, dense and pruned to 20 % of its MACs; compare."""
    settings = Settings(
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
    table, pruned = demonstrate(settings, images, out, arguments=context.params, progress=progress)
    console.print(table)
    _print_verified(pruned)
    console.print(f"pictures, networks and figures in {out}", soft_wrap=True)


def _print_verified(result: Result) -> None:
    if "difference" in result.figures:
        console.print(
            f"compact equals masked to {result.figures['difference']:.1e} of the output's scale (float64)"
        )
