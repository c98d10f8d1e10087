"""Lightning: one callback prunes, and every checkpoint can be resumed from.

python examples/lightning_trainer.py --epochs 10 --keep 0.2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import accuracy, gratings, network
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sparsekern
from sparsekern.integrations.lightning import PruningCallback

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--keep", type=float, default=0.2, help="share of the MACs that stays")
parser.add_argument("--batch", type=int, default=32, help="images a step")
parser.add_argument("--folder", type=Path, default=Path("."), help="where the files go")
args = parser.parse_args()


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.example_input_array = torch.zeros(1, 3, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sparsekern.optim.AdamW(self.parameters(), lr=2e-3)


pl.seed_everything(0)
train, test = gratings(1000), gratings(200, seed=1)
pruning = PruningCallback(keep=args.keep, shrink=True)
trainer = pl.Trainer(
    max_epochs=args.epochs,
    logger=False,
    default_root_dir=args.folder,
    callbacks=[pruning, ModelCheckpoint(args.folder, save_last=True)],
)
last = args.folder / "last.ckpt"
trainer.fit(
    Classifier(), DataLoader(train, args.batch, shuffle=True), ckpt_path=last if last.exists() else None
)

small = pruning.compact()
sparsekern.save(small, args.folder / "lightning_trainer.safetensors")
print(f"accuracy {accuracy(small, test):.3f} with {sum(p.numel() for p in small.parameters()):,} parameters")
