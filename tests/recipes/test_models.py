from __future__ import annotations

import pytest
import torch
from torchvision_models import models

from sparsekern.recipes.models import MobileNetV3Features, UNet, lraspp_mobilenetv3


def elements(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("width", "decoder", "millions"),
    [
        (64, "transposed", 31.04),
        (64, "bilinear", 31.38),
        (16, "transposed", 1.94),
        (16, "bilinear", 1.96),
    ],
)
def test_unet_has_the_published_size(width, decoder, millions):
    with torch.device("meta"):
        model = UNet(width=width, decoder=decoder)
    assert elements(model) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("decoder", ["transposed", "bilinear"])
@pytest.mark.parametrize("size", [(32, 32), (45, 38), (16, 16)])
def test_unet_keeps_any_image_size(decoder, size):
    model = UNet(in_channels=1, classes=3, width=2, decoder=decoder)
    assert model(torch.randn(2, 1, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    "bad", [{"width": 0}, {"depth": 0}, {"classes": 0}, {"in_channels": 0}, {"decoder": "deconv"}]
)
def test_unet_names_a_bad_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        UNet(**bad)


@pytest.mark.parametrize("variant", ["large", "small"])
@pytest.mark.parametrize("dilated", [False, True])
def test_mobilenetv3_features_are_those_of_torchvision(variant, dilated):
    theirs = getattr(models, f"mobilenet_v3_{variant}")(dilated=dilated).features.eval()
    ours = MobileNetV3Features(variant, dilated=dilated).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_mobilenetv3_multiplier_is_that_of_torchvision():
    theirs = models.mobilenet_v3_small(width_mult=0.75).features
    ours = MobileNetV3Features("small", multiplier=0.75)
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_lraspp_is_that_of_torchvision():
    theirs = models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    ours = lraspp_mobilenetv3("large", classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x)["out"])


def test_lraspp_takes_the_weights_of_a_classifier_and_of_its_features():
    classifier = models.mobilenet_v3_small()
    for weights in (classifier.state_dict(), classifier.features.state_dict()):
        ours = lraspp_mobilenetv3("small", backbone_weights=weights)
        assert torch.equal(ours.backbone[0][0].weight, classifier.features[0][0].weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        lraspp_mobilenetv3("large", backbone_weights=classifier.state_dict())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: MobileNetV3Features("huge"), "variant"),
        (lambda: MobileNetV3Features(multiplier=0.0), "multiplier"),
        (lambda: lraspp_mobilenetv3("small", classes=0), "classes"),
    ],
)
def test_mobilenetv3_names_a_bad_argument(make, name):
    with pytest.raises(ValueError, match=name):
        make()
