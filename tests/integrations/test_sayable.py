"""Widths that a configuration has no field for: told before the training, and kept by ``equal="config"``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekern.recipes._torchvision  # noqa: F401  # has to come before transformers, which imports torchvision

# isort: split

import transformers as hf
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sparsekern import Pruner, optim, prune_once, trace
from sparsekern.integrations.transformers import save_pretrained
from sparsekern.prune.decide.roles import Roles, role_name
from sparsekern.prune.decide.sayable import unsayable

IDS = {"input_ids": torch.arange(12).reshape(2, 6)}
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "use_cache": False}


def bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES))


def gpt2() -> Any:
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=48, n_positions=64, use_cache=False)
    return hf.GPT2LMHeadModel(config)


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8))


def gemma() -> Any:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8))


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))


# What stays: heads that follow from the hidden size alone, and hidden widths with a constant of their own.
UNSAID = {
    bert: "bert.encoder.layer.*.attention.self.query",
    gpt2: "transformer.h.*.attn.c_attn",
    qwen3: "model.embed_tokens",
    gemma: "model.embed_tokens",
}


def eager(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("make", UNSAID, ids=lambda make: make.__name__)
def test_what_no_configuration_says_stays_and_the_folder_is_written(make: Any, tmp_path: Path) -> None:
    model = eager(make)
    with pytest.warns(UserWarning, match=r"equal: got 'config', which keeps .* whole"):
        found = prune_once(
            model,
            (),
            example_kwargs=IDS,
            keep=0.9,
            of="params",
            select="magnitude",
            allocate="uniform",
            equal="config",
        )
    assert sum(p.numel() for p in found.network.parameters()) < sum(p.numel() for p in model.parameters())
    save_pretrained(found.network, tmp_path / "stock")
    again = type(model).from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        assert torch.equal(again(**IDS).logits, found.network(**IDS).logits)


@pytest.mark.parametrize("make", [gpt2, gemma], ids=lambda make: make.__name__)
def test_a_user_hears_of_it_before_the_training(make: Any) -> None:
    model = eager(make)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match=r"equal: got 'auto' .* expected 'config'") as caught:
        pruner = Pruner(model, optimizer, (), example_kwargs=IDS, keep=0.8, of="params", steps=20)
    assert UNSAID[make] in str(caught[0].message)
    # Nothing stays for that reason.
    assert UNSAID[make] in {role_name(model, group.name) for group in pruner.graph.groups}


def test_a_llama_is_saved_whole() -> None:
    model = eager(llama)
    assert unsayable(model, trace(model, (), example_kwargs=IDS)) == {}
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Pruner(
            model, optimizer, (), example_kwargs=IDS, keep=0.8, of="params", steps=20, equal="config"
        ).detach()


def test_a_model_without_a_configuration_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="equal: got 'config' for a Sequential, expected a model with"):
        Pruner(model, optimizer, torch.randn(2, 4), keep=0.5, steps=20, equal="config")


def test_every_second_hidden_width_leaves_all_numbers_of_heads() -> None:
    # Heads have to divide the hidden size: 4 of 6 heads do so for multiples of 12, and not for 18.
    sizes = GROUPED | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = eager(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)))
    graph = trace(model, (), example_kwargs=IDS)
    roles = Roles.of("role", model, graph)
    steps = {graph.groups[list(roles.numbers).index(n)].name: w.tolist() for n, w in roles.steps.items()}
    assert steps == {"model.embed_tokens": list(range(12, 97, 12))}


def test_a_model_that_is_sharded_keeps_its_configuration() -> None:
    model = eager(bert)
    expected = Roles.of("role", model, graph := trace(model, (), example_kwargs=IDS))
    said = unsayable(model, graph)
    # As fully_shard does, without processes.
    model.__class__ = type("FSDPBertForMaskedLM", (FSDPModule, type(model)), {})
    assert unsayable(model, graph) == said != {}
    found = Roles.of("role", model, graph)
    assert found.numbers.tolist() == expected.numbers.tolist() and found.steps.keys() == expected.steps.keys()
