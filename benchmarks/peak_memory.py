"""Peak memory of training steps that continue from a checkpoint of a run, and its known parts.

The peak is the high-water mark of the process's resident memory over some steps, reset after the checkpoint
is loaded (a full-size model exists for a moment before it is cut). The baseline is subtracted: the memory of
the process after a narrow model was trained for a step and freed, which has loaded all libraries. So the
figure covers parameters, gradients, optimizer state, activations, and the scratch memory of the convolutions.
Linux only: it reads and resets ``VmHWM``.

Prints JSON, all in bytes: ``peak``; ``weights``, ``gradients``, ``state`` (the optimizer's) and ``pruner``
(its arrays); ``saved``: the tensors that a forward pass keeps for the backward pass, without the parameters.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsekern.recipes.checkpoint import load_checkpoint
from sparsekern.recipes.load import load_data
from sparsekern.recipes.metrics import SegmentationLoss
from sparsekern.recipes.settings import Settings
from sparsekern.recipes.train import Trainer


def main(
    data: Annotated[Path, typer.Option(help="the folder that the run was trained on")],
    checkpoint: Annotated[Path, typer.Option(help="of the run")],
    steps: int = 4,
    threads: int = 1,
) -> None:
    """Print the peak over ``steps`` training steps, and the parts of it."""
    torch.set_num_threads(threads)
    state = load_checkpoint(checkpoint)
    settings = Settings(**state["settings"])
    # The images of `benchmarks.training`, which holds none back for validation.
    images = load_data(data, replace(settings, validation=0))
    train, test = images.train, images.test
    del state
    narrow = replace(settings, width=settings.width / 4, keep=settings.keep and 0.9, round_to=1)
    _train(Trainer(narrow, train, test), 1)
    _release()
    before = _status("VmRSS")
    trainer = Trainer(settings, train, test)
    trainer.load_state_dict(load_checkpoint(checkpoint))
    _release()
    Path("/proc/self/clear_refs").write_text("5")
    _train(trainer, steps)
    peak = _status("VmHWM") - before
    typer.echo(json.dumps({"peak": peak, **parts(trainer)}))


def parts(trainer: Trainer) -> dict[str, int]:
    """Bytes of the tensors of a training, and of those that its forward pass keeps for the backward pass."""
    params = list(trainer.model.parameters())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, y = trainer.batches(trainer.step)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = SegmentationLoss()(trainer.model(x.to(memory_format=torch.channels_last)), y)
    own = {param.untyped_storage().data_ptr() for param in params}
    saved = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    found = {"weights": _bytes(params), "saved": _bytes(saved)}
    loss.backward()
    state = trainer.optimizer.state.values()
    found["gradients"] = _bytes(param.grad for param in params if param.grad is not None)
    found["state"] = _bytes(value for values in state for value in values.values())
    rows = {} if trainer.pruner is None else trainer.pruner.state_dict()["rows"]
    found["pruner"] = _bytes(value for value in rows.values() if isinstance(value, Tensor))
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of the tensors, each storage counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def _train(trainer: Trainer, steps: int) -> None:
    trainer.model.train()
    criterion = SegmentationLoss()
    for step in range(steps):
        x, y = trainer.batches(step)
        criterion(trainer.model(x.to(memory_format=torch.channels_last)), y).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def _release() -> None:
    """Return freed memory to the system; the allocator would keep it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    typer.run(main)
