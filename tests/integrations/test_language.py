"""A small language model in a Hugging Face Trainer: MLPs, heads and hidden width shrink in mid-training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.networks import assert_same
from torch import Tensor, nn

import sparsekern
import sparsekern.recipes._torchvision  # has to come before transformers, which imports torchvision

# isort: split

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from sparsekern.integrations.transformers import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*")
STEPS, SAVED, LENGTH, VOCABULARY = 12, 5, 12, 24


def language(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def tokens(count: int) -> Tensor:
    """int64 ``[count, LENGTH]``: every token follows from the one before it."""
    starts = torch.arange(count)[:, None] * 5
    return (starts + 7 * torch.arange(LENGTH)) % VOCABULARY


def train(folder: Path, callback: PruningCallback, *, tied: bool = False, **options: Any) -> Trainer:
    set_seed(0)
    checkpoint = options.pop("resume_from_checkpoint", None)
    arguments = {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-2}
    trainer = Trainer(
        language(tied=tied),
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **arguments | options,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens(28)],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def widths(model: LlamaForCausalLM) -> tuple[int, list[int], list[int]]:
    """The hidden width, the widths of the MLPs, and the widths of all heads of a layer."""
    layers = model.model.layers
    mlps = [layer.mlp.down_proj.in_features for layer in layers]
    return (
        model.model.embed_tokens.embedding_dim,
        mlps,
        [layer.self_attn.o_proj.in_features for layer in layers],
    )


@pytest.mark.parametrize(
    ("tied", "options"),
    [(False, {}), (True, {"gradient_checkpointing": True, "bf16": True})],
    ids=["plain", "tied, checkpointing, bf16"],
)
def test_a_resumed_run_ends_as_the_undisturbed_one(
    tmp_path: Path, tied: bool, options: dict[str, Any]
) -> None:
    pruning: dict[str, Any] = {"keep": 0.3, "events": 3, "shrink": True, "round_to": 1}
    # Else the budget might be met without one of the kinds of channels.
    pruning["allocate"] = "uniform"
    whole = PruningCallback(tokens(2), **pruning)
    trainer = train(tmp_path / "whole", whole, tied=tied, **options)
    assert whole.pruner is not None and whole.pruner.finished
    assert whole.pruner.metrics()["macs_share"] <= 0.3
    hidden, mlps, heads = widths(trainer.model)
    assert hidden < 32 and sum(mlps) < 2 * 48 and sum(heads) < 2 * 32
    head, embedding = trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight
    assert (head is embedding) == tied
    callback = PruningCallback(tokens(2), **pruning)
    path = tmp_path / "whole" / f"checkpoint-{SAVED}"
    again = train(tmp_path / "again", callback, tied=tied, resume_from_checkpoint=str(path), **options)
    assert_same(trainer.model.state_dict(), again.model.state_dict())
    assert_same(trainer.optimizer.state_dict(), again.optimizer.state_dict())
    assert callback.pruner is not None
    assert_same(whole.pruner.state_dict(), callback.pruner.state_dict())
    # accelerate's autocast rounds what comes out to bfloat16's 8 bits.
    tolerance = 2**-6 if "bf16" in options else 1e-5
    small = callback.compact()
    with torch.no_grad():
        large = trainer.model.eval()(tokens(2)).logits
        assert (small.eval()(tokens(2)).logits - large).abs().max() <= tolerance * large.abs().max()


def loss(outputs: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def test_a_trained_model_is_pruned_once() -> None:
    """Under one budget all kinds of channels go, and what the model has learned is left."""
    torch.manual_seed(0)
    model, data = language(tied=True), tokens(24)
    untrained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss(model(data), data).backward()
        optimizer.step()
        optimizer.zero_grad()
    pruned = sparsekern.prune_once(
        model,
        data[:2],
        keep=0.7,
        allocate="uniform",
        calibration=[(data[:12], data[:12]), (data[12:], data[12:])],
        loss=loss,
    )
    hidden, mlps, heads = widths(pruned.network)
    assert hidden < 32 and sum(mlps) < 2 * 48 and sum(heads) <= 2 * 32
    with torch.no_grad():
        models = untrained, pruned.network, model
        before, after, trained = (float(loss(m.eval()(data), data)) for m in models)
    assert trained < after < before / 2
