"""Pruned models in folders that transformers opens without this package.

``python -m benchmarks.stock`` makes small models with random weights of every family, removes half of the
parameters at random under the default ``equal`` (less where that is too much), and writes each by
``save_pretrained``. One other process, which cannot import sparsekern, opens all folders by
``AutoModelForX.from_pretrained``. Its logits have to be those of the compact model bit by bit, and so have
the 32 tokens that ``generate`` gives, for models that generate.

A part is protected where the configuration of a family has no field for its width alone; the table names it.
``--refusals`` also tries every such family without this, to show the refusal.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import stock_reader
from benchmarks.environment import environment
from benchmarks.saved import save
from benchmarks.transformers_networks import BLOCK, GQA, LLAMA, SEQ2SEQ, VIT, Made, both, images, text
from sparsekern import prune_once
from sparsekern.integrations.transformers import save_pretrained

TOKENS = 32
PLACES = {"max_position_embeddings": 64}
LONG, LONG_GQA = {**LLAMA, **PLACES}, {**GQA, **PLACES}


class Family(NamedTuple):
    """A family of models.

    Attributes:
        make: makes a model and the arguments of its forward.
        kind: the class of transformers that opens the folder.
        protect: the parts that stay.
        why: why they do.
    """

    make: Callable[[], Made]
    kind: str = "AutoModelForCausalLM"
    protect: tuple[str, ...] = ()
    why: str = ""


HEADS = "heads: hidden_size is the width of all heads together"
FAMILIES = {
    "Llama": Family(text("LlamaConfig", "LlamaForCausalLM", **LONG_GQA)),
    "Llama, tied": Family(text("LlamaConfig", "LlamaForCausalLM", **LONG_GQA, tie_word_embeddings=True)),
    "Mistral": Family(text("MistralConfig", "MistralForCausalLM", **LONG_GQA)),
    "Qwen2": Family(text("Qwen2Config", "Qwen2ForCausalLM", **LONG_GQA)),
    "Phi-3": Family(text("Phi3Config", "Phi3ForCausalLM", **LONG_GQA)),
    "Qwen3": Family(
        text("Qwen3Config", "Qwen3ForCausalLM", **LONG_GQA, head_dim=8),
        protect=("model.layers.*.input_layernorm",),
        why="hidden width: its epsilon is also that of the norms of queries and keys",
    ),
    "Gemma": Family(
        text("GemmaConfig", "GemmaForCausalLM", **{**LONG_GQA, "num_key_value_heads": 1}, head_dim=8),
        protect=("model.embed_tokens",),
        why="hidden width: its square root multiplies the embedding",
    ),
    "Gemma2": Family(
        text("Gemma2Config", "Gemma2ForCausalLM", **LONG_GQA, head_dim=8),
        protect=("model.embed_tokens",),
        why="hidden width: its square root multiplies the embedding",
    ),
    "GPT-NeoX": Family(
        text("GPTNeoXConfig", "GPTNeoXForCausalLM", **LONG), protect=("*.attention.*",), why=HEADS
    ),
    "OPT": Family(
        text("OPTConfig", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32, **{**BLOCK, **PLACES}),
        protect=("*.self_attn.*",),
        why=HEADS,
    ),
    "GPT-2": Family(
        text("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64),
        protect=("*.attn.*",),
        why=HEADS,
    ),
    "BERT": Family(
        text("BertConfig", "BertForMaskedLM", **LONG), "AutoModelForMaskedLM", ("*.attention.*",), HEADS
    ),
    "ViT": Family(
        images("ViTConfig", "ViTForImageClassification", **VIT),
        "AutoModelForImageClassification",
        ("*.attention.*",),
        HEADS,
    ),
    "BART": Family(
        both("BartConfig", "BartForConditionalGeneration", **SEQ2SEQ, **PLACES),
        "AutoModelForSeq2SeqLM",
        ("*.self_attn.*", "*.encoder_attn.*"),
        HEADS,
    ),
    "T5": Family(
        both(
            "T5Config",
            "T5ForConditionalGeneration",
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "AutoModelForSeq2SeqLM",
    ),
}


def pruned(family: Family, protect: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any], float]:
    """The compact model, the arguments of its forward, and its parameters as a share."""
    torch.manual_seed(0)
    model, inputs = family.make()
    whole = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {"of": "params", "select": "random", "protect": protect}
    for keep in (0.5, 0.6, 0.7, 0.8):
        try:
            small = prune_once(model.eval(), (), example_kwargs=inputs, keep=keep, **options).network
        except ValueError as error:
            if not str(error).startswith("keep: "):
                raise
            continue
        return small, inputs, sum(p.numel() for p in small.parameters()) / whole
    raise ValueError(f"keep: got 0.8 for {family.kind}, expected more to stay")


def main(
    family: Annotated[list[str] | None, typer.Argument(help="Names; all by default.")] = None,
    refusals: Annotated[bool, typer.Option(help="Also try what a configuration cannot say.")] = False,
) -> None:
    warnings.simplefilter("ignore")
    names = family or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        raise typer.BadParameter(f"got {unknown}, expected some of {list(FAMILIES)}")
    cases, expected, rows = [], [], []
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            begin, own = process_time(), FAMILIES[name]
            refusal = _refusal(own, Path(place, f"{name} whole")) if refusals and own.protect else ""
            small, inputs, share = pruned(own, own.protect)
            folder = Path(place, name)
            save_pretrained(small, folder, (), example_kwargs=inputs)
            count = TOKENS if small.can_generate() and "input_ids" in inputs else 0  # type: ignore[operator]
            cases.append((own.kind, str(folder), inputs, count))
            expected.append(stock_reader.run(small, inputs, count))
            rows.append((name, f"{share:.2f}", f"{process_time() - begin:.0f}", own.why, refusal))
        found = read(cases, Path(place, "cases.pt"))
    table = Table(
        "family", "parameters left", "logits", "tokens of generate", "seconds", "what stays", "without"
    )
    good = 0
    for (name, share, seconds, why, refusal), ours, theirs in zip(rows, expected, found, strict=True):
        same = {key: torch.equal(value, theirs[key]) for key, value in ours.items()}
        good += all(same.values())
        tokens = {True: f"{TOKENS} equal", False: "DIFFERENT", None: "-"}[same.get("tokens")]
        table.add_row(
            name, share, "equal bits" if same["logits"] else "DIFFERENT", tokens, seconds, why, refusal
        )
    console = Console(record=True, width=150)
    console.print(
        table, f"{good} of {len(names)} families are opened without sparsekern and compute the same."
    )
    console.print(environment())
    if family is None:
        save("stock", console)
    raise typer.Exit(good != len(names))


def _refusal(family: Family, folder: Path) -> str:
    """What ``save_pretrained`` says where nothing is protected; "written" if no such part lost a channel."""
    small, inputs, _ = pruned(family, ())
    try:
        save_pretrained(small, folder, (), example_kwargs=inputs)
    except ValueError as error:
        return str(error).partition(" is ")[0].removeprefix("small: got ")
    return "written"


def read(cases: list[Any], path: Path) -> list[dict[str, Any]]:
    """What a process without sparsekern computes with the folders, see :mod:`benchmarks.stock_reader`."""
    torch.save(cases, path)
    # Isolated: the folder of this file is not searched, which has a module named transformers.
    subprocess.run([sys.executable, "-I", stock_reader.__file__, str(path)], check=True)
    return torch.load(f"{path}.read", weights_only=True)


if __name__ == "__main__":
    typer.run(main)
