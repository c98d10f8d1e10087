"""Loss and scores of a segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.recipes.data import COARSEST, VOID, Split, normalise
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.networks import Padded
from sparsekern.recipes.networks import output_channels as output_channels


class Scores(NamedTuple):
    """Scores in [0, 1] over all pixels of a split.

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

    Soft Dice is computed over all pixels of the batch, so that images without foreground do no harm.
    Shapes: logits float `[N, 1 or classes, H, W]`, target int64 `[N, H, W]`, to a scalar.

    Args:
        weights: float32 `[classes]`, weights of the classes in the weighted mean of the cross entropy; None
            for equal weights. The Dice term has no weights.
        void: whether targets may have pixels of the value `VOID`, which are ignored. A batch of void pixels
            alone has the loss 0.
    """

    def __init__(self, weights: Tensor | None = None, *, void: bool = False) -> None:
        super().__init__()
        self.weights = weights
        self.void = void

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        valid = None
        if self.void:
            valid = target != VOID
            target = torch.where(valid, target, 0)
        if logits.shape[1] == 1:
            truth = target.unsqueeze(1).to(logits.dtype)
            share = logits.sigmoid()
        else:
            truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
            share = logits.softmax(1)[:, 1:]
        entropy = self._entropy(logits, target, valid)
        if valid is not None:
            counted = valid.unsqueeze(1).to(logits.dtype)
            truth, share = truth * counted, share * counted
        both = (share * truth).sum((0, 2, 3))
        either = share.sum((0, 2, 3)) + truth.sum((0, 2, 3))
        return entropy + 1 - ((2 * both + 1) / (either + 1)).mean()

    def _entropy(self, logits: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
        """Mean cross entropy of the pixels that are not void."""
        plain = valid is None and self.weights is None
        reduction = "mean" if plain else "none"
        if logits.shape[1] == 1:
            truth = target.unsqueeze(1).to(logits.dtype)
            entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction=reduction)
        else:
            entropy = F.cross_entropy(logits, target, reduction=reduction)
        if plain:
            return entropy
        factors = torch.ones_like(target, dtype=logits.dtype)
        if self.weights is not None:
            factors = self.weights.to(logits)[target]
        if valid is not None:
            factors = factors * valid
        total = factors.sum()
        # Without any valid pixel the result is 0 instead of 0 / 0.
        return (entropy.reshape(factors.shape) * factors).sum() / torch.where(total > 0, total, 1)


def class_weights(text: str | None, pixels: NDArray[np.int64]) -> Tensor | None:
    """Weights of the classes in the cross entropy, float32 `[classes]`, or None for equal weights.

    Args:
        text: None, `"balanced"`, or a number for each class, such as `"1,2.5,2"`. `"balanced"` is
            scikit-learn's `pixels / (occurring classes * class pixels)`; a class without pixels gets 0.
        pixels: int64 `[classes]`, training pixels of each class.

    Raises:
        InputError: `text` is none of these.
    """
    if text is None:
        return None
    if text == "balanced":
        occurs = pixels > 0
        each = pixels.sum() / (max(1, occurs.sum()) * np.maximum(pixels, 1))
        return torch.from_numpy(np.where(occurs, each, 0.0)).float()
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(pixels) or not all(0 <= n < float("inf") for n in numbers) or not any(numbers):
        raise InputError(
            f"--class-weights: got {text!r}, expected balanced or {len(pixels)} numbers of at least 0, not "
            f"all 0, joined by commas (one for each class)"
        )
    return torch.tensor(numbers)


@torch.no_grad()
def import_torchmetrics() -> Any:
    """The class that counts. Its import takes seconds, so it waits until somebody scores or trains.

    Raises:
        ImportError: torchmetrics is missing, or torchvision does not fit torch.
    """
    from sparsekern.recipes._torchmetrics import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix


def count_confusion(
    model: nn.Module,
    split: Split,
    classes: int,
    batch: int = 8,
    asked: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """The confusion matrix of a model, without void pixels.

    The model gets whole images in evaluation mode; its mode is restored. Images of equal size share a batch.
    Images smaller than the largest stride are padded, unless the model is a `Padded`, which pads by itself.

    Args:
        model: gives logits of RGB images.
        split: the images.
        classes: number of classes, background included.
        batch: largest number of images in a batch.
        asked: called after every batch; when it returns True the evaluation stops.

    Returns:
        Pixels by true class (rows) and predicted class, int64 `[classes, classes]` on the CPU; None if
        `asked` stopped the evaluation.
    """
    confusion = import_torchmetrics()(classes, ignore_index=VOID)
    if not isinstance(model, Padded):
        split = split.padded(COARSEST)
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
                if asked():
                    return None
    finally:
        model.train(training)
    counts: Tensor = confusion.compute()
    return counts


def evaluate(model: nn.Module, split: Split, classes: int, batch: int = 8) -> Scores:
    """Scores of `model` on whole images, see `count_confusion`."""
    confusion = count_confusion(model, split, classes, batch)
    assert confusion is not None
    return scores(confusion)


def scores(confusion: Tensor) -> Scores:
    """Scores of a confusion matrix `[classes, classes]`, rows = truth.

    A class that occurs neither in truth nor in prediction is left out. If no class is left, the score is 1.
    """
    dice, iou = _by_class(confusion)
    shares = (x[~x.isnan()] for x in (dice[1:], iou))
    return Scores(*(float(x.mean()) if x.numel() else 1.0 for x in shares))


def scores_by_class(confusion: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """`name`, true `pixels`, `dice` and `iou` of each class, from a confusion matrix (rows are the truth).

    Dice and IoU of a class that occurs neither in truth nor in prediction are None.
    """
    dice, iou = _by_class(confusion)
    return [
        {"name": name, "pixels": int(pixels), "dice": _known(d), "iou": _known(i)}
        for name, pixels, d, i in zip(names, confusion.sum(1), dice, iou, strict=True)
    ]


def _by_class(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU, float64 `[classes]`, NaN where a class does not occur."""
    hits = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1)
    return 2 * hits / either, hits / (either - hits)


def _known(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
