"""A whole run: train, compact, verify, measure, store."""

from __future__ import annotations

import json
import signal
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern
from sparsekern import info
from sparsekern._copying import copied
from sparsekern.files.atomic import replacing
from sparsekern.recipes.checkpoint import save_checkpoint
from sparsekern.recipes.data import COARSEST, Data, normalise
from sparsekern.recipes.errors import InputError, Stopped
from sparsekern.recipes.files import CHECKPOINT, MODEL, RUN, begin_results, check_free, check_writable
from sparsekern.recipes.interrupt import deferred
from sparsekern.recipes.measure import latency, macs, parameters
from sparsekern.recipes.metrics import count_confusion, scores, scores_by_class
from sparsekern.recipes.networks import Padded
from sparsekern.recipes.resume import Saved, remember
from sparsekern.recipes.settings import Settings, build_model
from sparsekern.recipes.train import History, Step, Trainer

# Longest time between checkpoints in seconds: the most work lost if the process is killed.
CHECKPOINT_SECONDS = 120.0

# Largest allowed difference between masked and compact output in float64, over the output's scale.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        settings: settings of the run.
        history: losses, times, scores and costs.
        model: the stored network in evaluation mode; compact, or dense after a dense run.
        figures: plain numbers, see `_figures`.
    """

    settings: Settings
    history: History
    model: nn.Module
    figures: dict[str, Any]


def execute(
    settings: Settings,
    data: Data,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    backbone: Mapping[str, Tensor] | None = None,
    resume: Saved | None = None,
    checkpoint_every: int | None = None,
    overwrite: bool = False,
    stop_after: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Result | None:
    """Train a network and write run.json, model.safetensors and checkpoint.pt to `out`.

    A signal to stop (Ctrl-C) takes effect after the current step, with a checkpoint. A process that is killed
    loses the steps after its latest checkpoint.

    Args:
        settings: see `Trainer`.
        data: the images; `val` is scored during the training, `test` at its end.
        out: directory of the results, created with the first file.
        arguments: arguments of the user, for run.json; a resumed run takes some of them over.
        backbone: see `Trainer`.
        resume: the run to resume. A larger number of steps extends it, see `Trainer.load_state_dict`.
        checkpoint_every: steps between two checkpoints; 0 for one checkpoint at the end; None for one at
            every evaluation and at least one in `CHECKPOINT_SECONDS`.
        overwrite: whether to replace another run in `out`.
        stop_after: number of completed steps after which to stop with only a checkpoint.
        on_step: called after every step.

    Returns:
        The finished run; None if `stop_after` stopped it.

    Raises:
        InputError: an argument cannot be used, or `out` holds another run; nothing is trained or written.
        Stopped: a signal stopped the run; a checkpoint is written if a step was completed.
        RuntimeError: the outputs of compact and masked network differ, or the stored file differs.
    """
    check_counts(checkpoint_every, stop_after)
    same = check_out(out, resume, overwrite)
    trainer = Trainer(settings, data.train, data.val, backbone=backbone)
    if resume is not None:
        trainer.load_state_dict(resume.state)
    checkpoints = _Checkpoints(trainer, out, remember(arguments), checkpoint_every, overwrite and not same)

    def after(step: Step) -> None:
        if on_step is not None:
            on_step(step)
        checkpoints.after(step)

    with deferred() as request:
        trainer.run(stop_after, after, request)
        if trainer.step:
            checkpoints.save()
        if request.number is not None:
            raise _stopped(trainer, out, request.number)
    if not trainer.finished:
        return None
    try:
        result = _conclude(trainer, data, out)
        _write_json(out / RUN, arguments, result)
    except KeyboardInterrupt:
        raise _stopped(trainer, out, signal.SIGINT) from None
    return result


def check_counts(checkpoint_every: int | None, stop_after: int | None) -> None:
    """Check that numbers of steps are not negative.

    Raises:
        InputError: a number is negative; the error names the argument.
    """
    for name, value in (("checkpoint-every", checkpoint_every), ("stop-after", stop_after)):
        if value is not None and value < 0:
            raise InputError(f"--{name}: got {value}, expected 0 or more")


def check_out(out: Path, resume: Saved | None, overwrite: bool) -> bool:
    """Check that `out` can be written and holds no other run; `out` is not created.

    Returns:
        Whether `out` is the directory of the resumed run.

    Raises:
        InputError: `out` cannot be written or holds another run.
    """
    same = resume is not None and out.exists() and resume.folder.samefile(out)
    if not (same or overwrite):
        check_free(out, "--out")
    check_writable(out, "--out")
    return same


def _stopped(trainer: Trainer, out: Path, number: int) -> Stopped:
    way = f"go on with --resume {out}" if trainer.step else "nothing was written"
    return Stopped(f"stopped after step {trainer.step} of {trainer.settings.steps}; {way}", code=128 + number)


@dataclass
class _Checkpoints:
    """Writes the checkpoints of a run when they are due."""

    trainer: Trainer
    out: Path
    remembered: Mapping[str, Any]
    every: int | None
    overwrite: bool
    begun: bool = False
    saved_at: float = field(default_factory=perf_counter)

    def after(self, step: Step) -> None:
        """Write a checkpoint after `step` if one is due; the last one is written after the training."""
        if step.step < self.trainer.settings.steps and self._due(step):
            self.save()

    def _due(self, step: Step) -> bool:
        if self.every is not None:
            return self.every > 0 and step.step % self.every == 0
        return step.evaluated or perf_counter() - self.saved_at >= CHECKPOINT_SECONDS

    def save(self) -> None:
        if not self.begun:
            begin_results(self.out, self.overwrite)
            self.begun = True
        save_checkpoint(
            self.out / CHECKPOINT, self.trainer.state_dict() | {"remembered": dict(self.remembered)}
        )
        self.saved_at = perf_counter()


def _conclude(trainer: Trainer, data: Data, out: Path) -> Result:
    settings, pruner = trainer.settings, trainer.pruner
    image = normalise(data.test.padded(COARSEST).image(0)[None]).contiguous(memory_format=torch.channels_last)
    figures = {}
    small = trainer.model if pruner is None else pruner.compact()
    if pruner is not None:
        figures = _compaction(small, trainer)
    small = _on_cpu(small)
    if settings.shrink:
        # The live network has shrunk, so size and speed of the full one are measured on a new network.
        full = build_model(settings).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        full = small if pruner is None else _on_cpu(trainer.model)
    path = out / MODEL
    sparsekern.save(small, path, made_by=settings.network(data.bits).to_json(sparsekern.__version__))
    _check_stored(small, path)
    figures |= _figures(trainer.history, full, small, image, path)
    # The padding equals that of `sparsekern predict`, so these are the scores of its masks.
    confusion = count_confusion(Padded(small, settings.network().stride), data.test, settings.classes)
    assert confusion is not None
    found = scores(confusion)
    classes = scores_by_class(confusion, data.class_names(settings.classes))
    figures |= {"dice": found.dice, "miou": found.miou, "classes": classes}
    figures["images"] = {
        "train": len(data.train),
        "val": 0 if data.val is None else len(data.val),
        "test": len(data.test),
        "bits": data.bits,
    }
    return Result(settings, trainer.history, small.eval(), figures)


def _compaction(small: nn.Module, trainer: Trainer) -> dict[str, Any]:
    """Widths of a pruned network, and the difference between its output and the masked network's.

    Raises:
        RuntimeError: the difference exceeds `TOLERANCE`.
    """
    assert trainer.pruner is not None
    # In float64 the outputs differ only by rounding, so the tolerance can be strict.
    masked, compact = (copied(model).double() for model in (trainer.model, small))
    difference = sparsekern.verify(masked, compact, trainer.example.double())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"compact: got outputs that differ from those of the masked network by {difference:.1e} of their "
            f"scale in float64, expected at most {TOLERANCE:.0e}; please report this"
        )
    widths = trainer.pruner.widths()
    return {
        "difference": difference,
        "groups": list(widths),
        "channels": [channels for _, channels in widths.values()],
        "kept": [kept for kept, _ in widths.values()],
        "training_macs_share": _training_macs_share(trainer),
    }


def _training_macs_share(trainer: Trainer) -> float:
    """MACs of all forward passes of the training over those of a dense training."""
    if not trainer.settings.shrink:
        return 1.0
    return statistics.fmean(share for _, share, _ in trainer.history.cost)


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model on the CPU, for files and figures; a model on another device is copied."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return model if on_cpu else copied(model).cpu()


def _check_stored(small: nn.Module, path: Path) -> None:
    """Check that the file alone gives the saved network bit for bit.

    Raises:
        RuntimeError: a tensor differs.
    """
    loaded = sparsekern.load(path).state_dict()
    for name, value in small.state_dict().items():
        if not torch.equal(value, loaded[name]):
            raise RuntimeError(
                f"path: got {path} with other values of {name}, expected those that were saved; please "
                f"report this"
            )


def _figures(
    history: History, full: nn.Module, small: nn.Module, image: Tensor, path: Path
) -> dict[str, Any]:
    """Size, cost and speed of the stored network and of the full-size network that it comes from.

    MACs and latency (seconds per forward pass) refer to one test image. `step_seconds` and
    `optimizer_step_seconds` are medians, `seconds` and `optimizer_seconds` are sums over all steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        sparsekern.save(full, Path(folder) / MODEL)
        full_bytes = (Path(folder) / MODEL).stat().st_size
    models = {"full": full, "stored": small} if small is not full else {"stored": small}
    speed = latency(models, image)
    return {
        "parameters": parameters(small),
        "macs": macs(small, image),
        "file_bytes": path.stat().st_size,
        "latency": speed["stored"],
        "full": {
            "parameters": parameters(full),
            "macs": macs(full, image),
            "file_bytes": full_bytes,
            "latency": speed.get("full", speed["stored"]),
        },
        "image": list(image.shape),
        "threads": torch.get_num_threads(),
        "steps": len(history.loss),
        "seconds": sum(history.seconds),
        "step_seconds": statistics.median(history.seconds),
        "optimizer_seconds": sum(history.optimizer_seconds),
        "optimizer_step_seconds": statistics.median(history.optimizer_seconds),
        "loss": statistics.fmean(history.loss[-max(1, len(history.loss) // 20) :]),
    }


def _write_json(path: Path, arguments: Mapping[str, Any], result: Result) -> None:
    content = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in arguments.items()},
        "settings": result.settings.to_json(),
        "remembered": remember(arguments),
        "versions": info.versions(),
        "machine": info.machine(),
        "figures": result.figures,
        "history": vars(result.history),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
