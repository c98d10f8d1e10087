from __future__ import annotations

import pytest
import torch
from torchvision_models import models

import sparsekern
from sparsekern import criteria
from sparsekern.recipes.errors import InputError
from sparsekern.recipes.models import LRASPP, UNet
from sparsekern.recipes.settings import Settings, build_model, build_optimizer, parse_select

BAD = {
    "model": "resnet",
    "decoder": "deconv",
    "of": "flops",
    "allocate": "fair",
    "select": "taylor*luck",
    "depth": 0,
    "steps": 0,
    "batch": 0,
    "seed": -1,
    "classes": 1,
    "crop": 16,
    "min_channels": 0,
    "evaluations": 0,
    "lr": 0.0,
    "weight_decay": -1.0,
    "warmup": 1.0,
    "lr_warmup": 1.0,
    "width": -2.0,
    "ignore": "some",
    "class_weights": "1,2,3",
    "validation": 1.0,
}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_bad_value_is_refused_by_name_with_what_was_expected(name, value):
    with pytest.raises(InputError) as caught:
        Settings(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"--{name.replace('_', '-')}: got {value!r}, expected"), message


def test_a_unet_has_a_whole_width_and_masks_at_most_255_classes():
    with pytest.raises(InputError, match="whole number"):
        Settings(width=1.5)
    with pytest.raises(InputError, match="at most 255"):
        Settings(classes=256)


def test_criteria_combine_as_they_are_written():
    assert parse_select("joint") == criteria.default()
    assert parse_select("taylor") == criteria.Taylor()
    combined = parse_select("taylor * gradient-count + magnitude")
    expected = criteria.Taylor() * criteria.GradientCount() + criteria.Magnitude()
    assert repr(combined) == repr(expected)


def test_models_follow_the_settings():
    unet = build_model(Settings(width=4, depth=2, decoder="bilinear", classes=3))
    assert isinstance(unet, UNet) and unet.head.out_channels == 3 and len(unet.decoder) == 2
    mobile = build_model(Settings(model="mobilenetv3-small", width=0.5))
    assert isinstance(mobile, LRASPP) and mobile.backbone[0][0].out_channels == 8


def test_equal_seeds_give_equal_weights():
    first, again, other = (build_model(Settings(width=2, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_backbone_weights_must_fit():
    weights = models.mobilenet_v3_small().state_dict()
    model = build_model(Settings(model="mobilenetv3-small"), weights)
    assert torch.equal(model.backbone[0][0].weight, weights["features.0.0.weight"])
    with pytest.raises(InputError, match=r"--backbone: got weights that do not fit --model mobilenetv3 "):
        build_model(Settings(model="mobilenetv3"), weights)
    with pytest.raises(InputError, match="--backbone: got one with --model unet, expected none"):
        build_model(Settings(), weights)


def test_a_dense_run_has_the_fastest_optimizer_of_torch_and_a_pruned_one_ours():
    model = torch.nn.Linear(2, 2)
    dense = build_optimizer(model, Settings(keep=None))
    assert type(dense) is torch.optim.AdamW and dense.defaults["fused"]
    assert type(build_optimizer(model, Settings(keep=0.5))) is sparsekern.optim.AdamW
