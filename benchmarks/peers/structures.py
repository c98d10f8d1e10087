"""What each tool does with networks of many kinds: half of the channels go, and the outputs are compared.

Of every network two copies are pruned alike: the network itself, and one whose parameters hold the numbers of
their own elements. The second tells which elements stayed, whatever the tool does inside. Where removing is
exact, the network with all other elements at zero gives the outputs of the small one, in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

import sparsekern
from benchmarks.export_networks import CASES
from benchmarks.float64 import without_float32
from benchmarks.limited import limited
from benchmarks.networks import randomise
from sparsekern.compact import make_plan
from sparsekern.compact.verify import leaves

# isort: split

import transformers as hf

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Pair = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Hints:
    """What Torch-Pruning has to be told about a network, after its own examples.

    Attributes:
        options: of ``BasePruner``, from the network.
        repair: sets attributes of the pruned network that ``forward`` reads.
        lines: of code that a user writes for both.
    """

    options: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    repair: Callable[[nn.Module], None] = lambda model: None
    lines: int = 0


def _llama_options(model: Any) -> dict[str, Any]:
    heads = {}
    for layer in model.model.layers:
        heads[layer.self_attn.q_proj] = model.config.num_attention_heads
        heads[layer.self_attn.k_proj] = model.config.num_key_value_heads
        heads[layer.self_attn.v_proj] = model.config.num_key_value_heads
    return {
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.5,
        "ignored_layers": [model.lm_head],
        "output_transform": lambda outputs: outputs.logits,
    }


def _llama_repair(model: Any) -> None:
    model.config.hidden_size = model.lm_head.in_features
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def _vit_options(model: Any) -> dict[str, Any]:
    return {"round_to": model.encoder.layers[0].num_heads}


def _vit_repair(model: Any) -> None:
    model.hidden_dim = model.conv_proj.out_channels


HINTS = {"llama": Hints(_llama_options, _llama_repair, 15), "vit": Hints(_vit_options, _vit_repair, 2)}


@dataclass
class Outcome:
    """What a tool did with a network.

    Attributes:
        error: the first error, in a tracing, a removal or a run; empty if there was none.
        params_left: share of the parameters that stay.
        difference: largest difference between small and masked outputs over the largest output.
        hints: lines of code about the network that the tool needs.
    """

    tool: str
    network: str
    error: str = ""
    params_left: float = 1.0
    difference: float = 0.0
    hints: int = 0

    @property
    def text(self) -> str:
        """The outcome in a cell of the table."""
        if self.error:
            return f"fails: {self.error}"
        kind = "exact" if self.difference < 1e-10 else f"differs by {self.difference:.0e}"
        return f"{kind}, {self.params_left:.2f} of the parameters"


def llama() -> nn.Module:
    """A Llama of two layers with grouped heads and random weights."""
    config = hf.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config)


def networks() -> dict[str, Callable[[], tuple[nn.Module, Inputs]]]:
    """Makers of all networks in float64 and evaluation mode, each with its inputs."""

    def case(name: str) -> Callable[[], tuple[nn.Module, Inputs]]:
        example = tuple(x.double() for x in CASES[name].example())
        return lambda: (CASES[name].network().double(), (example, {}))

    def made() -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        model = llama()
        randomise(model)
        return model.double().eval(), ((), {"input_ids": torch.arange(16).reshape(2, 8)})

    return {**{name: case(name) for name in CASES}, "llama": made}


def numbered(model: nn.Module) -> nn.Module:
    """A copy whose parameters hold the numbers of their elements."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter))
    return other


def masked(model: nn.Module, numbers: nn.Module) -> nn.Module:
    """A copy of ``model`` in which the elements that are not in the small ``numbers`` are zero."""
    other = copy.deepcopy(model)
    kept = dict(numbers.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            mask = torch.zeros(parameter.numel(), dtype=parameter.dtype)
            mask[kept[name].flatten().long()] = 1
            parameter.mul_(mask.view_as(parameter))
    return other


def by_sparsekern(model: nn.Module, inputs: Inputs, hints: Hints) -> Pair:
    """The network and its numbered copy with half of each group removed at random."""
    graph = sparsekern.trace(model, inputs[0], example_kwargs=inputs[1] or None)
    kept, random = graph.all_channels(), np.random.default_rng(0)
    for group in graph.groups:
        kept[random.permutation(group.channels)[: len(group.channels) // 2]] = False
    plan = make_plan(graph, kept)
    numbers = sparsekern.compact(numbered(model), plan)
    with torch.no_grad():
        for name, parameter in numbers.named_parameters():
            # The weight of a mean of squares was scaled for the shorter mean, which is undone here.
            if name in plan.tensors and (part := plan.tensors[name]).factor != 1:
                parameter.copy_(((parameter + part.offset) / part.factor - part.offset).round())
    return sparsekern.compact(model, plan), numbers


def by_torch_pruning(model: nn.Module, inputs: Inputs, hints: Hints) -> Pair:
    """The same by Torch-Pruning; the numbered copy replays the history of the first."""
    small, numbers = copy.deepcopy(model), numbered(model)
    example = inputs[1] or (inputs[0] if len(inputs[0]) > 1 else inputs[0][0])
    options = {"ignored_layers": outputs_of(small), **hints.options(small)}
    importance = tp.importance.RandomImportance()
    pruner = tp.pruner.BasePruner(small, example, importance, pruning_ratio=0.5, **options)
    pruner.step()
    hints.repair(small)
    run(small, inputs)
    again = {key: value for key, value in hints.options(numbers).items() if key == "output_transform"}
    graph = tp.DependencyGraph().build_dependency(numbers, example_inputs=example, **again)
    graph.load_pruning_history(pruner.pruning_history())
    return small, numbers


def outputs_of(model: nn.Module) -> list[nn.Module]:
    """The layers that make an output, by their names in the cases; Torch-Pruning has to leave them alone."""
    names = ("head", "fc", "heads", "main", "side", "lm_head", "classifier")
    last = list(model.children())[-1:] if isinstance(model, nn.Sequential) else []
    return [*(child for name, child in model.named_children() if name in names), *last]


TOOLS: dict[str, Callable[[nn.Module, Inputs, Hints], Pair]] = {
    "sparsekern": by_sparsekern,
    "Torch-Pruning": by_torch_pruning,
}


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All outputs, in their order."""
    with torch.no_grad():
        return [tensor for _, tensor in leaves(model.eval()(*inputs[0], **inputs[1]))]


def isolated(tool: str, name: str, hinted: bool, seconds: int) -> Outcome:
    """:func:`examine` in a process of its own: Torch-Pruning came to no end on a small Llama."""
    try:
        return limited(_examine, tool, name, hinted, seconds=seconds)
    except TimeoutError as error:
        return Outcome(tool, name, f"TimeoutError: {error}", hints=HINTS[name].lines if hinted else 0)


def _examine(tool: str, name: str, hinted: bool) -> Outcome:
    without_float32()
    return examine(tool, name, hinted)


def examine(tool: str, name: str, hinted: bool) -> Outcome:
    """Prune one network with one tool, and compare."""
    hints = HINTS.get(name, Hints()) if hinted else Hints()
    outcome = Outcome(tool, name, hints=hints.lines)
    model, inputs = networks()[name]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small, numbers = TOOLS[tool](model, inputs, hints)
            pairs = list(zip(run(masked(model, numbers), inputs), run(small, inputs), strict=True))
        for a, b in pairs:
            if a.shape != b.shape:
                raise ValueError(f"an output of shape {list(a.shape)} has become {list(b.shape)}")
        outcome.difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
        return outcome
    before, after = (sum(p.numel() for p in network.parameters()) for network in (model, small))
    outcome.params_left = after / before
    return outcome
