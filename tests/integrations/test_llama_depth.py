"""A Llama of Hugging Face without some of its layers: the same logits, the same ``generate``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsekern
import sparsekern.recipes._torchvision  # has to come before transformers, which imports torchvision

# isort: split

from transformers import LlamaConfig, LlamaForCausalLM

from sparsekern.compact import compact, make_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def test_layers_go_and_the_cache_follows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=32, num_hidden_layers=3, pad_token_id=0)
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.arange(10).reshape(2, 5) + 1
    kwargs = {"input_ids": ids, "use_cache": False}
    graph = sparsekern.trace(model, (), example_kwargs=kwargs, depth=True)
    assert [block.path for block in graph.blocks] == [f"model.layers.{n}" for n in range(3)]
    kept = graph.all_channels()
    for block in (graph.blocks[0], graph.blocks[1]):
        kept[block.channel] = False
        for name in block.writers:
            model.get_parameter(name).data.zero_()
    small = compact(model, make_plan(graph, kept))
    assert small.config.num_hidden_layers == len(small.model.layers) == 1 and config.num_hidden_layers == 3
    assert small.model.layers[0].self_attn.layer_idx == 0 and small.model.config is small.config
    with torch.no_grad():
        assert torch.equal(small(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(small.generate(ids, **options), model.generate(ids, **options))
    assert torch.equal(small.generate(ids, **options, use_cache=False), model.generate(ids, **options))
    sparsekern.save(small, tmp_path / "small.safetensors")
    loaded = sparsekern.load(LlamaForCausalLM(config).double().eval(), tmp_path / "small.safetensors")
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
