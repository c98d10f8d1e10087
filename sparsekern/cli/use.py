"""The commands that use a stored network: predict, evaluate, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsekern.cli.app import ClassesFile, Device, Quiet, Threads, app, console, set_quiet, set_threads

Model = Annotated[Path, typer.Argument(help="model.safetensors of a training, its directory, or its export")]


@app.command()
def predict(
    model: Model,
    images: Annotated[
        list[str], typer.Argument(help="Images, directories, or patterns such as 'scans/*.tif'")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the masks: NAME.png for each image NAME.*")],
    overlay: Annotated[
        bool,
        typer.Option("--overlay", help="Also write NAME_overlay.png, the classes in colour on the image."),
    ] = False,
    device: Device = "cpu",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Write the masks of images: 0 and 255 for two classes, else class indices, of the images' sizes."""
    from sparsekern.recipes.predict import Segmenter, find_images, write_masks

    set_quiet(quiet)
    set_threads(threads)
    paths = find_images(images)
    segmenter = Segmenter(_file(model), device)
    written = sum(1 for _ in write_masks(segmenter, paths, out, overlay=overlay))
    console.print(f"{written} mask{'s' if written > 1 else ''} in {out}", soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="A folder or a CSV list, as for train")],
    split: Annotated[str, typer.Option(help="The images that are scored: test, val, train")] = "test",
    classes_file: ClassesFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Score a network on images with masks, by the masks that predict would write."""
    from sparsekern.recipes.errors import InputError
    from sparsekern.recipes.predict import Segmenter
    from sparsekern.recipes.synthetic import table_of

    set_quiet(False)
    set_threads(threads)
    segmenter = Segmenter(_file(model), device)
    if split not in ("train", "val", "test"):
        raise InputError(f"--split: got {split!r}, expected train, val or test")
    found = segmenter.load(data, table_of(data, classes_file))
    images = getattr(found, split)
    if images is None:
        raise InputError(
            f"--split: got {split!r}, expected train or test, as {data} has no validation images"
        )
    scores = segmenter.evaluate(images)
    if as_json:
        sys.stdout.write(json.dumps({"images": len(images), **scores._asdict()}) + "\n")
    else:
        console.print(f"{len(images)} {split} images: Dice {scores.dice:.4f}, mIoU {scores.miou:.4f}")


@app.command()
def export(
    model: Model,
    file: Annotated[Path, typer.Argument(help="The file to write: NAME.onnx, or NAME.xml for OpenVINO")],
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Write a network for ONNX Runtime or OpenVINO, for any batch and image size, and compare the file."""
    from sparsekern.recipes.errors import InputError
    from sparsekern.recipes.export import export as write
    from sparsekern.recipes.exported import RUNTIMES
    from sparsekern.recipes.predict import Segmenter

    set_quiet(quiet)
    set_threads(threads)
    if file.suffix not in RUNTIMES:
        raise InputError(f"FILE: got {file}, expected a name that ends in .onnx, or in .xml for OpenVINO")
    source = _file(model)
    if source.suffix in RUNTIMES:
        raise InputError(f"MODEL: got {source}, which is exported already; expected a model.safetensors")
    segmenter = Segmenter(source)
    difference = write(segmenter, file)
    console.print(
        f"{file}: {RUNTIMES[file.suffix]} equals torch to {difference:.1e} of the largest output",
        soft_wrap=True,
    )
    console.print(
        f"input: float32 [batch, 3, height, width], height and width multiples of {segmenter.spec.stride}",
        soft_wrap=True,
    )


def _file(model: Path) -> Path:
    """The model file in the directory of a training, or `model` itself if it is a file."""
    return model / "model.safetensors" if model.is_dir() else model
