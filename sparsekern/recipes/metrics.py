"""What a segmentation is trained by and judged by."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._torchmetrics import MulticlassConfusionMatrix
from .data import Split, normalise
from .networks import output_channels as output_channels


class Scores(NamedTuple):
    """Shares in [0, 1], over all pixels of a split together.

    Attributes:
        dice: `2 TP / (2 TP + FP + FN)`, mean over the foreground classes that occur.
        miou: `TP / (TP + FP + FN)`, mean over all classes that occur, background included.
    """

    dice: float
    miou: float


def predict(logits: Tensor) -> Tensor:
    """Class indices int64 `[N, H, W]` of logits `[N, 1 or classes, H, W]`."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


class SegmentationLoss(nn.Module):
    """Cross entropy (binary for one logit) plus one minus soft Dice of the foreground classes.

    Soft Dice is taken over all pixels of the batch, so that images without foreground do no harm.
    Shapes: logits float `[N, 1 or classes, H, W]`, target int64 `[N, H, W]`, to a scalar.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            truth = target.unsqueeze(1).to(logits.dtype)
            entropy = F.binary_cross_entropy_with_logits(logits, truth)
            share = logits.sigmoid()
        else:
            truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
            entropy = F.cross_entropy(logits, target)
            share = logits.softmax(1)[:, 1:]
        both = (share * truth).sum((0, 2, 3))
        either = share.sum((0, 2, 3)) + truth.sum((0, 2, 3))
        return entropy + 1 - ((2 * both + 1) / (either + 1)).mean()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, classes: int, batch: int = 8) -> Scores:
    """Scores of `model` on whole images, in evaluation mode; its mode is restored.

    Images of equal size share a batch of at most `batch`.
    """
    confusion = MulticlassConfusionMatrix(classes)
    training = model.training
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        sizes = np.stack([split.heights, split.widths], axis=1)
        for size in np.unique(sizes, axis=0):
            same = np.flatnonzero((sizes == size).all(1))
            for start in range(0, len(same), batch):
                index = [int(i) for i in same[start : start + batch]]
                images = normalise(np.stack([split.image(i) for i in index]))
                logits = model(images.to(device))
                truth = torch.from_numpy(np.stack([split.mask(i) for i in index]))
                confusion.update(predict(logits).cpu(), truth.long())
    finally:
        model.train(training)
    return scores(confusion.compute())


def scores(confusion: Tensor) -> Scores:
    """Scores of a confusion matrix `[classes, classes]`, rows = truth.

    A class that occurs neither in truth nor in prediction counts for nothing; if there is no other,
    nothing was to be found and nothing was: 1.
    """
    hits = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1)
    occurs = either > 0
    dice = (2 * hits / either)[1:][occurs[1:]]
    iou = (hits / (either - hits))[occurs]
    return Scores(*(float(x.mean()) if x.numel() else 1.0 for x in (dice, iou)))
