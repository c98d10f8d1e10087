"""The callback in a real Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.networks import CLASSES, assert_same, images
from torch import Tensor

import sparsekern
import sparsekern.recipes._torchvision  # has to come before transformers, which imports torchvision

# isort: split

from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sparsekern.integrations.transformers import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*")
STEPS, SAVED = 18, 5


def classifier() -> ResNetForImageClassification:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))


def dataset(count: int) -> list[dict[str, Any]]:
    x, y = images(count)
    big = torch.nn.functional.interpolate(x, scale_factor=2)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(big, y, strict=True)]


def example() -> Tensor:
    return torch.stack([entry["pixel_values"] for entry in dataset(2)])


def train(folder: Path, callback: PruningCallback | None, *, ours: bool = True, **options: Any) -> Trainer:
    set_seed(0)
    model = classifier()
    checkpoint = options.pop("resume_from_checkpoint", None)
    optimizer = sparsekern.optim.AdamW(model.parameters(), lr=1e-2) if ours else None
    arguments = {"max_steps": STEPS, "save_steps": SAVED, "logging_steps": 3, "learning_rate": 1e-2}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **arguments | options,
        ),
        train_dataset=dataset(28),
        eval_dataset=dataset(4),
        callbacks=[callback] if callback else [],
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("shrink", [{}, {"shrink": True, "round_to": 1}], ids=["whole", "shrunk"])
@pytest.mark.parametrize("ours", [True, False], ids=["fused", "own AdamW"])
def test_a_resumed_run_ends_as_the_undisturbed_one(
    tmp_path: Path, ours: bool, shrink: dict[str, Any]
) -> None:
    whole = PruningCallback(example(), keep=0.5, events=3, **shrink)
    trainer = train(tmp_path / "whole", whole, ours=ours)
    assert whole.pruner is not None and whole.pruner.finished
    assert (trainer.model.classifier[1].in_features < 16) == bool(shrink)
    for step in (SAVED, 3 * SAVED):
        callback = PruningCallback(example(), keep=0.5, events=3, **shrink)
        path = tmp_path / "whole" / f"checkpoint-{step}"
        again = train(tmp_path / f"{step}", callback, ours=ours, resume_from_checkpoint=str(path))
        assert_same(trainer.model.state_dict(), again.model.state_dict())
        assert_same(trainer.optimizer.state_dict(), again.optimizer.state_dict())
        assert callback.pruner is not None
        assert_same(whole.pruner.state_dict(), callback.pruner.state_dict())


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_accumulation_and_precisions(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = PruningCallback(example(), keep=0.5, events=2)
    trainer = train(tmp_path, callback, **options)
    assert callback.pruner is not None
    metrics = callback.pruner.metrics()
    assert metrics["step"] == trainer.state.global_step == STEPS
    assert metrics["finished"] and metrics["macs_share"] <= 0.5
    # accelerate's autocast rounds what comes out to bfloat16's 8 bits.
    tolerance = 2**-7 if "bf16" in options else 1e-5
    small = callback.compact()
    with torch.no_grad():
        large = trainer.model.eval()(example()).logits
        assert (small.eval()(example()).logits - large).abs().max() <= tolerance * large.abs().max()


def test_the_curves_are_logged(tmp_path: Path) -> None:
    callback = PruningCallback(example(), keep=0.5, events=2)
    history = train(tmp_path, callback).state.log_history
    shares = [entry["pruning/macs_share"] for entry in history]
    assert shares[0] == 1.0 and shares[-1] <= 0.5 and shares == sorted(shares, reverse=True)
    assert {"pruning/params_share", "pruning/condemned", "pruning/channels"} <= history[0].keys()


def test_a_callback_serves_one_training(tmp_path: Path) -> None:
    callback = PruningCallback(example(), keep=0.5, events=1)
    with pytest.raises(RuntimeError, match="pruner: got none yet"):
        callback.compact()
    trainer = train(tmp_path, callback, max_steps=5)
    with pytest.raises(RuntimeError, match="callback: got one that has pruned already"):
        trainer.train()


def test_the_best_model_cannot_be_loaded_at_the_end(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED}
    with pytest.raises(ValueError, match="load_best_model_at_end: got True, expected False"):
        train(tmp_path, PruningCallback(example(), keep=0.5), **options)


def test_a_checkpoint_without_the_callback_is_refused(tmp_path: Path) -> None:
    train(tmp_path, None, max_steps=SAVED)
    path = tmp_path / f"checkpoint-{SAVED}"
    with pytest.raises(ValueError, match="resume_from_checkpoint: got a checkpoint of a run without"):
        train(tmp_path, PruningCallback(example(), keep=0.5), resume_from_checkpoint=str(path))
