"""The main job on generated images, next to a training without pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sparsekern.recipes.data import Split, normalise
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.files import check_free, check_writable
from sparsekern.recipes.measure import latency
from sparsekern.recipes.metrics import predict
from sparsekern.recipes.run import Result, execute
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.synthetic import KINDS, Kind, generated
from sparsekern.recipes.train import Step
from sparsekern.report import runs as report

SHOWN = 4  # images in the picture of predictions

# Gives a callback for the steps of a training, by its name and number of steps.
Progress = Callable[[str, int], AbstractContextManager[Callable[[Step], None]]]


def demonstrate(
    settings: Settings,
    images: int,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    progress: Progress,
    kind: Kind = KINDS["cells"],
    overwrite: bool = False,
) -> tuple[Table, Result]:
    """Trains dense and pruned with otherwise equal settings, and compares the two.

    Writes curves.png, predictions.png, and the results of the trainings in dense/ and pruned/.

    Args:
        settings: of the pruned training; generated images are as large as its crop.
        images: how many to train on; a quarter as many again to test.
        out: directory of the results.
        arguments: what the user gave, for run.json.
        progress: shows the progress of a training.
        kind: what the images show.
        overwrite: replace the runs of another demonstration in `out`.

    Returns:
        The comparison, and the pruned run.

    Raises:
        InputError: an argument cannot be used, or `out` holds runs; nothing was trained.
        Stopped: a signal came.
    """
    if images < 1:
        raise InputError(f"--images: got {images}, expected at least 1")
    for name in ("dense", "pruned"):
        if not overwrite:
            check_free(out / name, "--out")
        check_writable(out / name, "--out")
    data = generated(kind, train=images, test=max(SHOWN, images // 4), size=settings.crop, seed=settings.seed)
    runs: dict[str, Result] = {}
    for name, keep in (("dense", None), ("pruned", settings.keep)):
        with progress(name, settings.steps) as on_step:
            result = execute(
                replace(settings, keep=keep),
                data,
                out / name,
                arguments=arguments,
                overwrite=overwrite,
                on_step=on_step,
            )
        assert result is not None
        runs[name] = result
    report.curves(out / "curves.png", runs)
    _predictions(out / "predictions.png", runs, data.test)
    return _table(runs, settings, data.test), runs["pruned"]


def _predictions(path: Path, runs: Mapping[str, Result], test: Split) -> None:
    images = [test.image(index) for index in range(SHOWN)]
    truths = [test.mask(index) for index in range(SHOWN)]
    x = normalise(np.stack(images))
    with torch.inference_mode():
        found = {name: list(predict(run.model(x)).numpy()) for name, run in runs.items()}
    report.predictions(path, images, truths, found)


def _table(runs: Mapping[str, Result], settings: Settings, test: Split) -> Table:
    image = normalise(test.image(0)[None]).contiguous(memory_format=torch.channels_last)
    # Timed anew, taking turns: the two trainings ended minutes apart.
    speed = latency({name: run.model for name, run in runs.items()}, image)
    columns = {name: run.figures | {"latency": speed[name]} for name, run in runs.items()}
    return report.comparison(
        f"UNet, {settings.crop}x{settings.crop} pixels an image, {torch.get_num_threads()} threads",
        columns,
    )
