from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsekern.recipes.data import Split
from sparsekern.recipes.metrics import (
    SegmentationLoss,
    evaluate,
    output_channels,
    predict,
    scores,
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
    masks = [random.integers(0, 2, size, dtype=np.uint8) for size in ((4, 6), (5, 5), (4, 6))]
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
    assert sorted(model.seen) == [((1, 3, 5, 5), False), ((2, 3, 4, 6), False)]
