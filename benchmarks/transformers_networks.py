"""Small random configurations of transformers and timm models; nothing is downloaded.

Every entry of ``NETWORKS`` makes a model and the keyword arguments of its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers, which imports torchvision

# isort: split

import transformers as hf
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
VOCABULARY = 64


def tokens(length: int = 8) -> Tensor:
    return torch.arange(2 * length).reshape(2, length) % (VOCABULARY - 4) + 3


def text(kind: str, model: str, **options: Any) -> Callable[[], Made]:
    """A model of token ids: ``kind`` is the configuration's class, ``model`` the network's."""

    def make() -> Made:
        config = getattr(hf, kind)(vocab_size=VOCABULARY, pad_token_id=0, **options)
        # A cache of keys and values is for generation.
        config.use_cache = False
        return getattr(hf, model)(config), {"input_ids": tokens()}

    return make


def both(kind: str, model: str, **options: Any) -> Callable[[], Made]:
    """An encoder and decoder of token ids."""

    def make() -> Made:
        made, inputs = text(kind, model, **options)()
        return made, {**inputs, "decoder_input_ids": tokens(6)}

    return make


def images(
    kind: str, model: str, *, size: int = 32, inputs: dict[str, Any] | None = None, **options: Any
) -> Callable[[], Made]:
    """A model of images."""

    def make() -> Made:
        config = getattr(hf, kind)(**options)
        pixels = torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)
        return getattr(hf, model)(config), {"pixel_values": pixels.sin(), **(inputs or {})}

    return make


def contrastive(name: str) -> Callable[[], Made]:
    """CLIP or SigLIP."""

    def make() -> Made:
        written = {**BLOCK, "vocab_size": VOCABULARY, "max_position_embeddings": 8}
        if name == "CLIP":
            written["eos_token_id"] = 62
        seen = {**BLOCK, "image_size": 32, "patch_size": 8}
        config = getattr(hf, f"{name}Config")(text_config=written, vision_config=seen, projection_dim=16)
        pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
        return getattr(hf, f"{name}Model")(config), {"input_ids": tokens(), "pixel_values": pixels}

    return make


def speech() -> Made:
    config = hf.Wav2Vec2Config(
        **BLOCK,
        vocab_size=VOCABULARY,
        conv_dim=(16, 16),
        conv_stride=(4, 2),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    return hf.Wav2Vec2ForCTC(config), {"input_values": torch.linspace(-1, 1, 2 * 400).reshape(2, 400).sin()}


def whisper() -> Made:
    config = hf.WhisperConfig(
        **SEQ2SEQ,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        use_cache=False,
    )
    features = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32).sin()
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": features,
        "decoder_input_ids": tokens(6),
    }


def llava() -> Made:
    seen = {**BLOCK, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    written = {**LLAMA, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "model_type": "llama"}
    config = hf.LlavaConfig(
        vision_config=seen, text_config=written, image_token_index=2, vision_feature_layer=-1
    )
    config.text_config.use_cache = False
    ids = tokens()
    ids[:, 1:5] = 2
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()
    return hf.LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": pixels}


def detector(name: str, **options: Any) -> Callable[[], Made]:
    """A detector or segmenter with a small ResNet or Swin as its backbone."""

    def make() -> Made:
        backbone = hf.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"] if name == "Detr" else ["stage2", "stage3", "stage4"],
        )
        if name in ("MaskFormer", "Mask2Former"):
            backbone = hf.SwinConfig(
                image_size=64,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[2, 2, 2, 2],
                window_size=2,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )
        if name == "RTDetr":
            backbone = hf.RTDetrResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 32],
                depths=[1, 1, 1, 1],
                layer_type="basic",
                out_features=["stage2", "stage3", "stage4"],
            )
        config = getattr(hf, f"{name}Config")(backbone_config=backbone, **options)
        head = "ForUniversalSegmentation" if name == "Mask2Former" else "ForObjectDetection"
        head = "ForInstanceSegmentation" if name == "MaskFormer" else head
        pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()
        return getattr(hf, f"{name}{head}")(config), {"pixel_values": pixels}

    return make


def dense(name: str) -> Callable[[], Made]:
    """DPT, Depth Anything or UperNet."""

    def make() -> Made:
        options: dict[str, Any] = {}
        if name == "DPT":
            options = {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
            options |= {"neck_hidden_sizes": [8, 8, 16, 16]}
            options |= {"fusion_hidden_size": 16, "head_in_index": -1, "is_hybrid": False}
            model = "DPTForDepthEstimation"
        elif name == "DepthAnything":
            backbone = hf.Dinov2Config(
                **{**VIT, "num_hidden_layers": 4},
                out_features=["stage1", "stage2", "stage3", "stage4"],
                reshape_hidden_states=False,
            )
            options = {"backbone_config": backbone, "patch_size": 8, "reassemble_hidden_size": 32}
            options |= {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "head_hidden_size": 8}
            model = "DepthAnythingForDepthEstimation"
        else:
            backbone = hf.ConvNextConfig(
                hidden_sizes=[8, 8, 16, 16],
                depths=[1, 1, 1, 1],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )
            options = {"backbone_config": backbone, "hidden_size": 16, "auxiliary_in_channels": 16}
            options |= {"auxiliary_channels": 8, "num_labels": 5}
            model = "UperNetForSemanticSegmentation"
        config = getattr(hf, f"{name}Config")(**options)
        pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()
        size = 32 if "image_size" in options else 64
        return getattr(hf, model)(config), {"pixel_values": pixels[..., :size, :size].contiguous()}

    return make


def timm_model(name: str, **options: Any) -> Callable[[], Made]:
    """A model of timm in its own size."""

    def make() -> Made:
        import timm

        pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()
        return timm.create_model(name, pretrained=False, num_classes=10, **options), {"x": pixels}

    return make


BLOCK: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA: dict[str, Any] = {**BLOCK, "max_position_embeddings": 32}
GQA: dict[str, Any] = {**LLAMA, "num_key_value_heads": 2}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
VIT: dict[str, Any] = {**BLOCK, "image_size": 32, "patch_size": 8}
DETR: dict[str, Any] = {**SEQ2SEQ, "num_queries": 5, "num_labels": 3}
STAGES: dict[str, Any] = {
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 4],
}

NETWORKS: dict[str, Callable[[], Made]] = {
    "Llama": text("LlamaConfig", "LlamaForCausalLM", **GQA),
    "Llama, tied": text("LlamaConfig", "LlamaForCausalLM", **GQA, tie_word_embeddings=True),
    "Mistral": text("MistralConfig", "MistralForCausalLM", **GQA),
    "Qwen2": text("Qwen2Config", "Qwen2ForCausalLM", **GQA),
    "Qwen3": text("Qwen3Config", "Qwen3ForCausalLM", **GQA, head_dim=8),
    "Gemma": text("GemmaConfig", "GemmaForCausalLM", **{**GQA, "num_key_value_heads": 1}, head_dim=8),
    "Gemma2": text("Gemma2Config", "Gemma2ForCausalLM", **GQA, head_dim=8),
    "Gemma3": text("Gemma3TextConfig", "Gemma3ForCausalLM", **GQA, head_dim=8),
    "Phi": text("PhiConfig", "PhiForCausalLM", **LLAMA),
    "Phi-3": text("Phi3Config", "Phi3ForCausalLM", **GQA),
    "GPT-2": text("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "GPT-NeoX": text("GPTNeoXConfig", "GPTNeoXForCausalLM", **LLAMA),
    "OPT": text(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    ),
    "Falcon": text(
        "FalconConfig", "FalconForCausalLM", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    # The default kernel for experts refuses float64.
    "Mixtral": text(
        "MixtralConfig", "MixtralForCausalLM", **GQA, num_local_experts=4, experts_implementation="batched_mm"
    ),
    "BERT": text("BertConfig", "BertForMaskedLM", **LLAMA),
    "ModernBERT": text("ModernBertConfig", "ModernBertForMaskedLM", **LLAMA),
    "DeBERTa": text("DebertaV2Config", "DebertaV2Model", **LLAMA),
    "T5": both(
        "T5Config", "T5ForConditionalGeneration", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    ),
    "BART": both("BartConfig", "BartForConditionalGeneration", **SEQ2SEQ, max_position_embeddings=32),
    "Whisper": whisper,
    "wav2vec 2": speech,
    "Mamba": text(
        "MambaConfig", "MambaForCausalLM", hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4
    ),
    "ViT": images("ViTConfig", "ViTForImageClassification", **VIT),
    "DINOv2": images("Dinov2Config", "Dinov2ForImageClassification", **VIT),
    "BEiT": images("BeitConfig", "BeitForImageClassification", **VIT, use_relative_position_bias=True),
    "Swin": images(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "SegFormer": images(
        "SegformerConfig", "SegformerForSemanticSegmentation", size=64, **STAGES, decoder_hidden_size=16
    ),
    "PVTv2": images(
        "PvtV2Config",
        "PvtV2ForImageClassification",
        size=64,
        image_size=64,
        **STAGES,
    ),
    "LeViT": images(
        "LevitConfig",
        "LevitForImageClassification",
        size=64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 4, 4],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
        down_ops=[["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2], [""]],
    ),
    "MobileViT": images(
        "MobileViTConfig",
        "MobileViTForImageClassification",
        size=64,
        image_size=64,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
    ),
    "CLIP": contrastive("CLIP"),
    "SigLIP": contrastive("Siglip"),
    "Llava": llava,
    "DETR": detector("Detr", **DETR, use_timm_backbone=False),
    "Deformable DETR": detector("DeformableDetr", **DETR, use_timm_backbone=False, num_feature_levels=3),
    "RT-DETR": detector(
        "RTDetr",
        d_model=32,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 32],
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=2,
        num_queries=5,
        num_labels=3,
        num_denoising=0,
    ),
    "MaskFormer": detector("MaskFormer", fpn_feature_size=32, mask_feature_size=32),
    "Mask2Former": detector(
        "Mask2Former",
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=48,
        dim_feedforward=48,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=5,
    ),
    "DPT": dense("DPT"),
    "Depth Anything": dense("DepthAnything"),
    "UperNet": dense("UperNet"),
    "HGNetV2": timm_model("hgnetv2_b0"),
    "CAFormer": timm_model("caformer_s18"),
    "ConvNeXt V2": timm_model("convnextv2_atto", depths=[1, 1, 1, 1], dims=[8, 16, 16, 32]),
    "CaiT": timm_model("cait_xxs24_224", depth=2, embed_dim=48, img_size=64),
    "XCiT": timm_model("xcit_nano_12_p16_224", depth=2, embed_dim=32, img_size=64),
    "NextViT": timm_model("nextvit_small", depths=(1, 1, 5, 1)),
}
