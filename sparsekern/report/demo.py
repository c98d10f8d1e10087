"""A demonstration on generated images: a pruned training beside a dense one."""

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

# Gives the step callback for a training with a name and a number of steps.
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
    """Train dense and pruned networks with otherwise equal settings, and compare the two.

    Writes curves.png, predictions.png, and the results of the trainings in dense/ and pruned/.

    Args:
        settings: settings of the pruned training; generated images are as large as its crop.
        images: number of training images; the test has a quarter of that number, at least 4.
        out: directory of the results.
        arguments: arguments of the user, for run.json.
        progress: shows the progress of a training.
        kind: kind of the generated images.
        overwrite: whether to replace the runs of another demonstration in `out`.

    Returns:
        The comparison, and the pruned run.

    Raises:
        InputError: an argument cannot be used, or `out` holds runs; nothing is trained.
        Stopped: a signal stopped the training.
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
    # Both networks are timed again in turns, as the two trainings ended minutes apart.
    speed = latency({name: run.model for name, run in runs.items()}, image)
    columns = {name: run.figures | {"latency": speed[name]} for name, run in runs.items()}
    return report.comparison(
        f"UNet, {settings.crop}x{settings.crop} pixels an image, {torch.get_num_threads()} threads",
        columns,
    )
