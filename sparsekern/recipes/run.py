"""A whole run: train, compact, verify, measure, store."""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern
from sparsekern import _info

from .._files import replacing
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Split, normalise
from .errors import InputError
from .files import writable_directory
from .measure import latency, macs, parameters
from .metrics import evaluate
from .settings import Settings, build_model
from .train import History, Step, Trainer

MODEL, CHECKPOINT, RUN = "model.safetensors", "checkpoint.pt", "run.json"

# Largest difference of masked and compact output in float64, over the output's scale.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        settings: its arguments. history: what happened.
        model: what was stored, in evaluation mode: compact, or the dense network of a dense run.
        figures: plain numbers, see `_figures`.
    """

    settings: Settings
    history: History
    model: nn.Module
    figures: dict[str, Any]


def execute(
    settings: Settings,
    train: Split,
    test: Split,
    out: Path,
    *,
    arguments: Mapping[str, Any],
    backbone: Mapping[str, Tensor] | None = None,
    resume: Path | None = None,
    checkpoint_every: int = 0,
    stop_after: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Result | None:
    """Trains as `settings` say and writes run.json, model.safetensors and checkpoint.pt to `out`.

    Args:
        settings, train, test, backbone: see `Trainer`.
        out: directory of the results, made if it is not there.
        arguments: what the user gave, for run.json.
        resume: checkpoint to go on from.
        checkpoint_every: steps between two checkpoints; 0 for one at the end only.
        stop_after: stop when so many steps are done and leave only the checkpoint.
        on_step: called after every step.

    Returns:
        None if the run was stopped before its end.

    Raises:
        InputError: something in the arguments cannot be used; nothing was trained or written.
        RuntimeError: the compact network does not compute what the masked one does.
    """
    writable_directory(out, "--out")
    for name, value in (("checkpoint-every", checkpoint_every), ("stop-after", stop_after or 0)):
        if value < 0:
            raise InputError(f"--{name}: got {value}, expected 0 or more")
    state = None if resume is None else load_checkpoint(resume)
    trainer = Trainer(settings, train, test, backbone=backbone)
    if state is not None:
        trainer.load_state_dict(state)

    def after(step: Step) -> None:
        if on_step is not None:
            on_step(step)
        if checkpoint_every and step.step % checkpoint_every == 0:
            save_checkpoint(out / CHECKPOINT, trainer.state_dict())

    trainer.run(stop_after, after)
    save_checkpoint(out / CHECKPOINT, trainer.state_dict())
    if not trainer.finished:
        return None
    result = _conclude(trainer, out)
    _write_json(out / RUN, arguments, result)
    return result


def _conclude(trainer: Trainer, out: Path) -> Result:
    settings, full = trainer.settings, trainer.model
    if settings.shrink:
        # Only its size and speed are asked for, which are not those of the live network any more.
        full = build_model(settings).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = normalise(trainer.test.image(0)[None]).contiguous(memory_format=torch.channels_last)
    small, figures = trainer.model, {}
    if trainer.pruner is not None:
        small = trainer.pruner.compact()
        figures = _compaction(small, trainer)
    path = out / MODEL
    sparsekern.save(small, path)
    _check_stored(small, path, settings, image)
    figures |= _figures(trainer.history, full, small, image, path)
    scores = evaluate(small, trainer.test, settings.classes)
    figures |= {"dice": scores.dice, "miou": scores.miou}
    return Result(settings, trainer.history, small.eval(), figures)


def _compaction(small: nn.Module, trainer: Trainer) -> dict[str, Any]:
    """Widths of a pruned network, and proof that it computes what the trained one does."""
    assert trainer.pruner is not None
    # In float64 the two differ by rounding at most, so that the tolerance can be strict.
    masked, compact = (copy.deepcopy(model).double() for model in (trainer.model, small))
    difference = sparsekern.verify(masked, compact, trainer.example.double())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"the compact network differs from the masked one by {difference:.1e} of the output's "
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
    """MACs of the forward passes of the whole training over those of a dense one."""
    if not trainer.settings.shrink:
        return 1.0
    return statistics.fmean(share for _, share, _ in trainer.history.cost)


def _check_stored(small: nn.Module, path: Path, settings: Settings, image: Tensor) -> None:
    """The file, loaded into a fresh full-size network, must give the very network that was saved."""
    loaded = sparsekern.load(build_model(settings), path).state_dict()
    for name, value in small.state_dict().items():
        if not torch.equal(value, loaded[name]):
            raise RuntimeError(f"{path} does not hold {name} as it was saved; please report this")


def _figures(
    history: History, full: nn.Module, small: nn.Module, image: Tensor, path: Path
) -> dict[str, Any]:
    """Size, cost and speed of the stored network and of the full-size one it comes from.

    MACs and latency (seconds a forward pass) are for one test image; `step_seconds` and
    `optimizer_step_seconds` are medians, `seconds` and `optimizer_seconds` sums over all steps.
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
        "versions": _info.versions(),
        "machine": _info.machine(),
        "figures": result.figures,
        "history": vars(result.history),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
