"""Hugging Face Trainer: one callback prunes a ResNet, and every checkpoint can be resumed from.

python examples/hugging_face.py --epochs 10 --keep 0.2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import CLASSES, gratings
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import sparsekern
from sparsekern.integrations.transformers import PruningCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--keep", type=float, default=0.2, help="share of the MACs that stays")
parser.add_argument("--batch", type=int, default=32, help="images a step")
parser.add_argument("--folder", type=Path, default=Path("hugging_face"), help="where the files go")
args = parser.parse_args()


def collate(entries: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    x, y = zip(*entries, strict=True)
    return {"pixel_values": torch.stack(x), "labels": torch.stack(y)}


def correct(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


set_seed(0)
config = ResNetConfig(
    embedding_size=32, hidden_sizes=[64, 128], depths=[1, 1], layer_type="basic", num_labels=CLASSES
)
model = ResNetForImageClassification(config)
optimizer = sparsekern.optim.AdamW(model.parameters(), lr=2e-3)
train, test = gratings(1000), gratings(200, seed=1)
pruning = PruningCallback(train[:1][0], keep=args.keep, shrink=True)
trainer = Trainer(
    model,
    TrainingArguments(
        str(args.folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        save_strategy="epoch",
        report_to=[],
        remove_unused_columns=False,
    ),
    data_collator=collate,
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=correct,
    callbacks=[pruning],
    optimizers=(optimizer, None),
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.folder)) if args.folder.exists() else None)

scores, small = trainer.evaluate(), pruning.compact()
sparsekern.save(small, args.folder / "hugging_face.safetensors")
print(
    f"accuracy {scores['eval_accuracy']:.3f} with {sum(p.numel() for p in small.parameters()):,} parameters"
)
