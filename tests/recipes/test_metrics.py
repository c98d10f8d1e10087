from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsekern.recipes.data import VOID, Split
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.metrics import (
    SegmentationLoss,
    class_weights,
    count_confusion,
    evaluate,
    output_channels,
    predict,
    scores,
    scores_by_class,
)


def test_scores_of_a_hand_made_confusion():
    # Background 50 right, 5 called foreground; foreground 3 missed, 40 found.
    dice, miou = scores(torch.tensor([[50, 5], [3, 40]]))
    assert dice == pytest.approx(80 / 88)
    assert miou == pytest.approx((50 / 58 + 40 / 48) / 2)


def test_classes_that_do_not_occur_count_for_nothing():
    dice, miou = scores(torch.tensor([[7, 0, 0], [0, 0, 0], [1, 0, 3]]))
    assert dice == pytest.approx(6 / 7)
    assert miou == pytest.approx((7 / 8 + 3 / 4) / 2)
    assert scores(torch.tensor([[9, 0], [0, 0]])) == (1.0, 1.0)


def test_predict_reads_one_logit_as_foreground():
    assert predict(torch.tensor([-1.0, 2.0]).view(1, 1, 1, 2)).tolist() == [[[0, 1]]]
    assert predict(torch.tensor([1.0, 0.0, 3.0]).view(1, 3, 1, 1)).tolist() == [[[2]]]
    assert [output_channels(classes) for classes in (2, 3)] == [1, 3]


@pytest.mark.parametrize("classes", [2, 4])
def test_loss_is_zero_for_certainty_and_has_the_value_of_its_formula(classes):
    target = torch.arange(classes).repeat(6).view(1, 2, -1)
    truth = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).double()
    certain = (2 * truth - 1) * 50
    unsure = torch.zeros_like(certain)
    if classes == 2:
        certain, unsure = certain[:, 1:], unsure[:, 1:]
    loss = SegmentationLoss()
    assert float(loss(certain, target)) == pytest.approx(0, abs=1e-12)
    share, pixels = 1 / classes, target.numel()
    dice = (2 * share * pixels / classes + 1) / (share * pixels + pixels / classes + 1)
    assert float(loss(unsure, target)) == pytest.approx(math.log(classes) + 1 - dice)


class Threshold(nn.Module):
    """Says foreground where the image is red; notes its inputs and its mode."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), self.training))
        return x[:, :1]


def test_evaluate_scores_all_pixels_together_and_restores_the_mode():
    random = np.random.default_rng(0)
    masks = [random.integers(0, 2, size, dtype=np.uint8) for size in ((32, 36), (33, 33), (32, 36))]
    images = [np.repeat(mask[..., None] * np.uint8(255), 3, 2) for mask in masks]
    masks[1] = 1 - masks[1]
    model = Threshold().train()
    dice, miou = evaluate(model, Split.from_arrays("abc", images, masks), 2, batch=2)
    right = sum(int(mask.sum()) for mask in (masks[0], masks[2]))
    wrong = masks[1].size
    assert dice == pytest.approx(2 * right / (2 * right + wrong))
    background = sum(int((1 - mask).sum()) for mask in (masks[0], masks[2]))
    assert miou == pytest.approx((right / (right + wrong) + background / (background + wrong)) / 2)
    assert model.training
    assert sorted(model.seen) == [((1, 3, 33, 33), False), ((2, 3, 32, 36), False)]


def test_void_and_images_smaller_than_the_network_needs_count_for_nothing():
    mask = np.zeros((20, 40), np.uint8)
    mask[:10] = 1
    image = np.repeat(mask[..., None] * np.uint8(255), 3, 2)
    mask[:3] = VOID
    counts = count_confusion(Threshold(), Split.from_arrays("a", [image], [mask]), 2)
    assert counts.tolist() == [[10 * 40, 0], [0, 7 * 40]]


def test_an_evaluation_ends_when_it_is_asked_to():
    split = Split.from_arrays("ab", [np.zeros((32, 32, 3), np.uint8)] * 2, [np.zeros((32, 32), np.uint8)] * 2)
    model = Threshold().train()
    assert count_confusion(model, split, 2, batch=1, asked=lambda: True) is None
    assert len(model.seen) == 1 and model.training


def test_scores_by_class_name_what_occurs_and_what_does_not():
    rows = scores_by_class(torch.tensor([[7, 0, 0], [0, 0, 0], [1, 0, 3]]), ("back", "never", "cell"))
    assert rows[0] == {"name": "back", "pixels": 7, "dice": 14 / 15, "iou": 7 / 8}
    assert rows[1] == {"name": "never", "pixels": 0, "dice": None, "iou": None}
    assert rows[2] == {"name": "cell", "pixels": 4, "dice": 6 / 7, "iou": 3 / 4}


@pytest.mark.parametrize("classes", [2, 4])
def test_the_loss_with_void_is_that_of_the_other_pixels(classes):
    torch.manual_seed(0)
    logits = torch.randn(2, output_channels(classes), 6, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, classes, (2, 6, 8))
    target[:, :, 5:] = VOID
    weights = torch.arange(1.0, classes + 1)
    for given in (None, weights):
        loss = SegmentationLoss(given, void=True)(logits, target)
        cut = SegmentationLoss(given, void=False)(logits[..., :5], target[..., :5])
        assert loss.item() == pytest.approx(cut.item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient[..., 5:].any() and gradient[..., :5].all()
    nothing = SegmentationLoss(void=True)(logits, torch.full_like(target, VOID))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing.item() == pytest.approx(0.0, abs=1e-12) and not gradient.any()


@pytest.mark.parametrize("classes", [2, 3])
def test_class_weights_are_those_of_torch(classes):
    torch.manual_seed(0)
    logits, target = torch.randn(2, classes, 4, 4), torch.randint(0, classes, (2, 4, 4))
    weights = torch.tensor([1.0, 3.0, 0.5])[:classes]
    expected = torch.nn.functional.cross_entropy(logits, target, weight=weights)
    ours = logits if classes > 2 else (logits[:, 1:] - logits[:, :1])
    plain, weighted = SegmentationLoss(), SegmentationLoss(weights)
    rest = plain(ours, target) - torch.nn.functional.cross_entropy(logits, target)
    assert float(weighted(ours, target) - rest) == pytest.approx(float(expected), rel=1e-5)


def test_balanced_weights_are_inverse_frequencies():
    weights = class_weights("balanced", np.array([60, 30, 0, 10]))
    assert weights.tolist() == pytest.approx([100 / 180, 100 / 90, 0.0, 100 / 30])
    assert class_weights(None, np.array([1, 2])) is None
    assert class_weights("1, 2.5", np.array([1, 2])).tolist() == [1.0, 2.5]


@pytest.mark.parametrize("text", ["", "even", "1", "1,2,3", "1,-2", "0,0", "1,nan", "1,inf"])
def test_other_weights_are_refused(text):
    with pytest.raises(InputError, match="--class-weights: got .*expected balanced or 2 numbers"):
        class_weights(text, np.array([1, 2]))
