"""Folders of compact models: opened without sparsekern, refused where no configuration fits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers, which imports torchvision

# isort: split

import transformers as hf

from benchmarks import stock_reader
from benchmarks.stock import read
from sparsekern import compact, trace
from sparsekern.compact import make_plan
from sparsekern.configs import Skeleton, by_config
from sparsekern.configs.depth import with_depth
from sparsekern.graph import ChannelGraph
from sparsekern.integrations.transformers import layer_widths, save_pretrained
from sparsekern.prune.decide.roles import Roles

pytestmark = pytest.mark.filterwarnings("ignore:.*")
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IDS = {"input_ids": torch.arange(12).reshape(2, 6)}


def made(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(hf, kind.replace("ForCausalLM", "").replace("Model", "") + "Config")(**SIZES | options)
    return getattr(hf, kind)(config).eval()


@pytest.fixture(scope="module")
def llama() -> tuple[Any, ChannelGraph]:
    model = made("LlamaForCausalLM")
    return model, trace(model, (), example_kwargs={**IDS, "use_cache": False})


def cut(model: Any, graph: ChannelGraph, widths: dict[str, int]) -> Any:
    """The model with the last channels of some groups removed, by endings of the groups' names."""
    kept = graph.all_channels()
    for group in graph.groups:
        for ending, width in widths.items():
            if group.name.endswith(ending):
                kept[group.channels[width:]] = False
    return compact(model, make_plan(graph, kept))


def fewer(small: Any) -> Any:
    """The model without its first layer, as a removal of whole blocks leaves it."""
    del small.model.layers[0]
    for index, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = index
    return small


def uneven_kinds() -> Any:
    """A model whose layers differ in their attention, without the first of three."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    options = {"num_hidden_layers": 3, "layer_types": kinds, "use_sliding_window": True, "sliding_window": 3}
    small = fewer(made("Qwen2ForCausalLM", **options))
    left = with_depth(type(small), small.config, Skeleton.of(small))
    assert (left.num_hidden_layers, left.layer_types) == (2, kinds[1:])
    # The forward of this family reads the kinds from the configuration.
    small.config.num_hidden_layers, small.config.layer_types = 2, kinds[1:]
    return small


def test_another_process_repeats_outputs_and_generated_tokens(
    llama: tuple[Any, ChannelGraph], tmp_path: Path
) -> None:
    tied = {"embed_tokens": 20, "self_attn.q_proj": 1, "mlp.gate_proj": 17}
    smalls = {
        "all widths": cut(*llama, tied),
        "depth": fewer(cut(*llama, {"mlp.gate_proj": 17})),
        "depth with kinds": uneven_kinds(),
        "heads of a size of their own": made("Phi3ForCausalLM", head_dim=12),
    }
    cases = []
    for name, small in smalls.items():
        before = copy.deepcopy(small.config.to_dict()), small.training
        save_pretrained(small, tmp_path / name)
        assert (small.config.to_dict(), small.training) == before
        cases.append(("AutoModelForCausalLM", str(tmp_path / name), IDS, 32))
    config = json.loads((tmp_path / "all widths" / "config.json").read_text())
    expected = {
        "hidden_size": 20,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 17,
    }
    assert config.items() >= (expected | {"head_dim": 8, "rms_norm_eps": 1e-6 * 32 / 20}).items()
    config = json.loads((tmp_path / "depth with kinds" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    for small, found in zip(smalls.values(), read(cases, tmp_path / "cases.pt"), strict=True):
        ours = stock_reader.run(small, IDS, 32)
        assert torch.equal(ours["logits"], found["logits"]) and torch.equal(ours["tokens"], found["tokens"])
        assert found["class"] == type(small).__name__


def refused(small: nn.Module, folder: Path, **options: Any) -> str:
    """The message of the refusal; it leaves nothing behind."""
    with pytest.raises(ValueError) as error:
        save_pretrained(small, folder / "new" / "model", **options)
    assert list(folder.iterdir()) == []
    return str(error.value)


def test_layers_that_differ_are_named_with_the_way_out(
    llama: tuple[Any, ChannelGraph], tmp_path: Path
) -> None:
    small = cut(*llama, {"0.mlp.gate_proj": 20, "1.mlp.gate_proj": 16})
    text = refused(small, tmp_path)
    assert "no LlamaConfig makes: intermediate_size is 20 by model.layers.0.mlp.gate_proj.weight" in text
    assert "16 by model.layers.1.mlp.gate_proj.weight" in text and "prune with equal='role'" in text
    assert layer_widths(small) == {
        "llama.block_count": 2,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": [20, 16],
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
    }
    uneven = cut(*llama, {"0.self_attn.q_proj": 1, "1.mlp.gate_proj": 16})
    assert (
        layer_widths(uneven).items()
        >= {
            "llama.feed_forward_length": [24, 16],
            "llama.attention.head_count": [2, 4],
            "llama.attention.head_count_kv": [1, 2],
        }.items()
    )


def test_a_width_that_a_family_refuses_says_so(llama: tuple[Any, ChannelGraph], tmp_path: Path) -> None:
    text = refused(cut(*llama, {"embed_tokens": 19}), tmp_path)
    assert (
        "got sizes that LlamaConfig refuses" in text and "multiple of the number of attention heads" in text
    )
    roles = Roles.of("auto", *llama)
    accepted = {llama[1].groups[0].name: np.arange(4, 33, 4).tolist()}
    assert {llama[1].groups[n].name: w.tolist() for n, w in roles.steps.items()} == accepted
    assert roles.numbers.tolist() == [0, 1, 2, 1, 2]


def test_parts_of_encoder_and_decoder_that_one_field_sets_are_one_role() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 32}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
    tensors = ("encoder.block.0.layer.1", "decoder.block.0.layer.2")
    parts = [[(f"{n}.DenseReluDense.wi.weight", 0), (f"{n}.DenseReluDense.wo.weight", 1)] for n in tensors]
    assert by_config(model, parts, [24, 24]).numbers == [0, 0]
    config = hf.BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    config.update(
        {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 9}
    )
    bart = hf.BartModel(config)
    parts = [
        [(f"{n}.layers.0.fc1.weight", 0), (f"{n}.layers.0.fc1.bias", 0), (f"{n}.layers.0.fc2.weight", 1)]
        for n in ("encoder", "decoder")
    ]
    assert by_config(bart, parts, [24, 24]).numbers == [0, 1]


def test_heads_that_a_hidden_size_ties_are_named(tmp_path: Path) -> None:
    model = made("BertModel")
    for layer in model.encoder.layer:
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, nn.Linear(32, 16))
        layer.attention.output.dense = nn.Linear(16, 32)
    text = refused(model, tmp_path)
    assert "hidden_size is 32 by" in text and "16 by encoder.layer.0.attention.self.query.weight" in text
    assert "protect=['encoder.layer.*.attention.self.query'" in text
    with pytest.raises(ValueError, match="no BertConfig makes: hidden_size"):
        layer_widths(model)


def test_a_width_that_a_family_computes_with_is_named(tmp_path: Path) -> None:
    model = made("Gemma2ForCausalLM", head_dim=8)
    model.model.embed_tokens.embed_scale.fill_(7.0)
    assert "does not repeat: model.embed_tokens.embed_scale is 7.0 and there 5.65" in refused(model, tmp_path)
    model = made("Qwen3ForCausalLM", head_dim=8)
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 2e-6
    text = refused(model, tmp_path)
    assert "rms_norm_eps is" in text and "protect=['model.layers.*.input_layernorm']" in text


@pytest.mark.parametrize("kind", ["file", "files"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path) -> None:
    model, place = made("LlamaForCausalLM", num_hidden_layers=1), tmp_path / "place"
    if kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r"^folder: cannot write .*expected a new or an empty folder"):
        save_pretrained(model, place)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_argument_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="^small: got Linear, expected a transformers PreTrainedModel"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "a")  # type: ignore[arg-type]
    model = made("LlamaForCausalLM", num_hidden_layers=1)
    with pytest.raises(TypeError, match="^folder: got int"):
        save_pretrained(model, 3)  # type: ignore[arg-type]
    model.model.extra = nn.Linear(2, 2)
    assert "a size that no field sets" in refused(model, tmp_path)
