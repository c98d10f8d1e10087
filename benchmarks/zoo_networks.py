"""Forty networks from four libraries that channel pruning has to support."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before torchvision


class Network(NamedTuple):
    """make: builds it with random weights. shape: of one image, without the batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _torchvision(name: str, side: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        models = import_module("torchvision.models")
        module: nn.Module = models.get_model(name, weights=None, **options)
        return module

    return Network(make, (3, side, side))


def _timm(name: str, side: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        module: nn.Module = import_module("timm").create_model(name, pretrained=False, **options)
        return module

    return Network(make, (3, side, side))


def _smp(name: str, encoder: str, side: int = 64) -> Network:
    def make() -> nn.Module:
        kind = getattr(import_module("segmentation_models_pytorch"), name)
        module: nn.Module = kind(encoder, encoder_weights=None, in_channels=3, classes=2)
        return module

    return Network(make, (3, side, side))


def _monai(name: str, shape: tuple[int, ...], **options: Any) -> Network:
    def make() -> nn.Module:
        module: nn.Module = getattr(import_module("monai.networks.nets"), name)(**options)
        return module

    return Network(make, shape)


_UNET = {
    "in_channels": 1,
    "out_channels": 2,
    "channels": (16, 32, 64, 128),
    "strides": (2, 2, 2),
    "num_res_units": 2,
}
_SEGMENTATION = {"weights_backbone": None}

NETWORKS: dict[str, Network] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "densenet121": _torchvision("densenet121"),
    "vgg16_bn": _torchvision("vgg16_bn"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "inception_v3": _torchvision("inception_v3", 139, aux_logits=False, init_weights=False),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_b_16": _torchvision("vit_b_16", image_size=64),
    "swin_t": _torchvision("swin_t"),
    "fcn_resnet50": _torchvision("fcn_resnet50", **_SEGMENTATION),
    "deeplabv3_resnet50": _torchvision("deeplabv3_resnet50", **_SEGMENTATION),
    "lraspp_mobilenet_v3_large": _torchvision("lraspp_mobilenet_v3_large", **_SEGMENTATION),
    "smp_unet_resnet34": _smp("Unet", "resnet34"),
    "smp_unet_mobilenet_v2": _smp("Unet", "mobilenet_v2"),
    "smp_unetplusplus_resnet34": _smp("UnetPlusPlus", "resnet34"),
    "smp_fpn_resnet34": _smp("FPN", "resnet34"),
    "smp_pspnet_resnet34": _smp("PSPNet", "resnet34"),
    "smp_segformer_resnet34": _smp("Segformer", "resnet34"),
    "monai_unet_2d": _monai("UNet", (1, 64, 64), spatial_dims=2, **_UNET),
    "monai_unet_3d": _monai("UNet", (1, 32, 32, 32), spatial_dims=3, **_UNET),
    "monai_basicunet": _monai("BasicUNet", (1, 64, 64), spatial_dims=2, in_channels=1, out_channels=2),
    "monai_segresnet": _monai("SegResNet", (1, 64, 64), spatial_dims=2, in_channels=1, out_channels=2),
    "seresnet50": _timm("seresnet50"),
    "res2net50": _timm("res2net50_26w_4s"),
    "hrnet_w18_small": _timm("hrnet_w18_small"),
    "repvgg_a2": _timm("repvgg_a2"),
    "dm_nfnet_f0": _timm("dm_nfnet_f0"),
    "cspdarknet53": _timm("cspdarknet53"),
    "mobilevit_s": _timm("mobilevit_s"),
    "deit_tiny": _timm("deit_tiny_patch16_224", img_size=64),
    "mixer_s16": _timm("mixer_s16_224", img_size=64),
    "poolformer_s12": _timm("poolformer_s12"),
    "convnextv2_atto": _timm("convnextv2_atto"),
    "edgenext_small": _timm("edgenext_small"),
}
