"""Removing whole blocks: outputs, numbers that follow, plans, files and the optimizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compact.networks import unchanged
from graph.block_networks import ResNet, Transformer, images, tokens, transformer, without
from torch import nn

import sparsekern
from sparsekern.compact import Plan, TensorPlan, compact, load, make_plan, plan_of, save, shrink
from sparsekern.compact.block_plans import ListPlan


@pytest.fixture(scope="module")
def found() -> tuple[Transformer, sparsekern.graph.ChannelGraph]:
    return transformer(layers=5)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(ours(tokens()), theirs(tokens()))


@pytest.mark.parametrize("gone", [(1,), (0, 3), (0, 1, 3, 4)], ids=str)
def test_outputs_caches_and_files_of_the_shorter_network(
    found: tuple[Transformer, sparsekern.graph.ChannelGraph], gone: tuple[int, ...], tmp_path: Path
) -> None:
    model, graph = copy.deepcopy(found[0]), found[1]
    plan = make_plan(graph, without(model, graph, *(f"layers.{n}" for n in gone)))
    with unchanged(model):
        small = compact(model, plan)
    left = [n for n in range(5) if n not in gone]
    assert same(small, model) and len(small.layers) == len(left)
    assert [layer.attention.layer_idx for layer in small.layers] == list(range(len(left)))
    assert small.config == SimpleNamespace(
        num_hidden_layers=len(left), layer_types=[f"kind {n}" for n in left]
    )
    assert model.config.num_hidden_layers == 5
    assert torch.equal(small.generate(tokens(), 8), model.generate(tokens(), 8))
    assert plan_of(small).blocks == plan.blocks == {"layers": ListPlan(5, tuple(left))}
    save(small, tmp_path / "small.safetensors")
    loaded = load(Transformer(5).double().eval(), tmp_path / "small.safetensors")
    assert same(loaded, small) and plan_of(loaded) == plan_of(small)
    assert same(load(loaded, tmp_path / "small.safetensors"), small)


@pytest.mark.parametrize("training", [False, True])
def test_blocks_and_channels_of_a_convolutional_network(training: bool) -> None:
    torch.manual_seed(1)
    model = ResNet(nn.ReLU).double()
    graph = sparsekern.trace(model, images(), depth=True)
    kept = without(model, graph, "stage1.0", "stage2.1")
    for group in graph.groups:
        # Half of the residual stream, and of the blocks' inner channels.
        if kept[group.channels].any() and not group.of_blocks:
            kept[group.channels[1::2]] = False
    with torch.no_grad():
        for name, slots in graph.tensors.items():
            rows = None if slots.row_dim is None else slots.channels[slots.row_dim]
            if slots.kind == "parameter" and rows is not None:
                gone = torch.from_numpy((rows >= 0) & ~kept[rows])
                model.get_parameter(name).transpose(0, slots.row_dim)[gone] = 0
    model.train(training)
    small = compact(model, make_plan(graph, kept))
    assert len(small.stage1) == 2 and len(small.stage2) == 1 and small.stem.out_channels == 4
    with torch.no_grad():
        assert (small(images()) - model(images())).abs().max() < 1e-12


def test_a_live_model_loses_blocks_with_the_optimizers_state(
    found: tuple[Transformer, sparsekern.graph.ChannelGraph],
) -> None:
    model, graph = copy.deepcopy(found[0]), found[1]
    ema = copy.deepcopy(model)
    for optimizer in (sparsekern.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),):
        model(tokens()).sum().backward()
        optimizer.step()
        kept = without(model, graph, "layers.1")
        layers, last = model.layers, model.layers[4]
        shrink(model, make_plan(graph, kept), optimizer=optimizer, also=[ema])
        assert model.layers is layers and layers[3] is last and len(ema.layers) == 4
        assert [p for p in optimizer.param_groups[0]["params"]] == list(model.parameters())
        assert set(optimizer.state) == set(model.parameters())
        model(tokens()).sum().backward()
        optimizer.step()
        later = graph.restrict(kept)
        shrink(model, make_plan(later, without(model, later, "layers.0", "layers.3")), optimizer=optimizer)
        assert plan_of(model).blocks == {"layers": ListPlan(5, (2, 3))}
        assert [layer.attention.layer_idx for layer in model.layers] == [0, 1]
        # A plan for the original model names everything that stays, also on a model that was cut before.
        assert same(compact(model, plan_of(model)), model)
        assert plan_of(compact(ema, plan_of(model))) == plan_of(model)


def test_a_failed_cut_changes_nothing(found: tuple[Transformer, sparsekern.graph.ChannelGraph]) -> None:
    model, graph = copy.deepcopy(found[0]), found[1]
    optimizer = torch.optim.AdamW(model.parameters())
    plan = make_plan(graph, without(model, graph, "layers.1"))
    model.layers[2].norm1.weight.register_hook(lambda grad: grad)

    class Odd(Transformer):
        def __init__(self) -> None:
            super().__init__(4)

    with unchanged(model), pytest.raises(ValueError, match=r"also\[0\]: got a"):
        shrink(model, plan, optimizer=optimizer, also=[Odd()])
    assert len(model.layers) == 5 and len(optimizer.param_groups[0]["params"]) == len(
        list(model.parameters())
    )


def test_plans_of_blocks_as_data() -> None:
    first = Plan(
        {"layers.1.w": TensorPlan((4,), {0: [0, 2]}), "layers.2.w": TensorPlan((4,), {0: [1]})},
        {"layers": ListPlan(4, (0, 2, 3))},
    )
    assert list(first.tensors) == ["layers.2.w"]
    later = Plan({"layers.2.w": TensorPlan((4,), {0: [3]})}, {"layers": ListPlan(3, (1, 2))})
    both = first.then(later)
    assert both.blocks == {"layers": ListPlan(4, (2, 3))} and set(both.tensors) == {
        "layers.2.w",
        "layers.3.w",
    }
    assert both.after(first) == Plan({**later.tensors, "layers.1.w": TensorPlan((1,))}, later.blocks)
    assert Plan.from_json(both.to_json()) == both
    assert json.loads(both.to_json())["version"] == 3
    assert json.loads(Plan(both.tensors).to_json())["version"] == 1
    assert both.inside("net").blocks == {"net.layers": ListPlan(4, (2, 3))}
    assert "layers: 4 blocks -> 2" in str(both)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"layers": ListPlan(4, (0,))}, "4 modules in the list 'layers', expected 5"),
        ({"norm": ListPlan(2, (0,))}, "'norm', expected no such list"),
    ],
)
def test_a_plan_for_other_lists_is_refused(
    found: tuple[Transformer, sparsekern.graph.ChannelGraph], blocks: dict[str, ListPlan], message: str
) -> None:
    with unchanged(found[0]), pytest.raises(ValueError, match=message):
        compact(found[0], Plan({}, blocks))


def test_bad_plans_of_blocks() -> None:
    with pytest.raises(ValueError, match="keep: got indices"):
        ListPlan(3, (0, 3))
    with pytest.raises(ValueError, match="count: got 0, expected"):
        ListPlan(0, (0,))
    with pytest.raises(ValueError, match="blocks: got "):
        Plan({}, {"layers": (0, 1)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected a count"):
        Plan.from_json(
            '{"format":"sparsekern.plan","version":3,"indices":["0"],"tensors":{},"blocks":{"a":{"count":1e9,"keep":0}}}'
        )
    with pytest.raises(ValueError, match="done: got modules"):
        Plan({}, {"a": ListPlan(3, (0, 1))}).after(Plan({}, {"a": ListPlan(3, (0, 2))}))


def test_a_count_that_may_be_of_several_lists_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_layers = 4
            self.one, self.two = Transformer(4), Transformer(4)

    plan = Plan({}, {"one.layers": ListPlan(4, (0, 1, 2))})
    model = Two()
    with (
        unchanged(model),
        pytest.raises(ValueError, match="an attribute 'num_layers' that counts the blocks of one"),
    ):
        compact(model, plan)
    del model.num_layers
    assert compact(model, plan).one.config.num_hidden_layers == 3


def test_the_depths_of_stages_follow() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # As many stages as the third one has blocks.
            self.config, self.num_layers = SimpleNamespace(depths=[2, 2, 3]), 3
            self.stages = nn.ModuleList(
                nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))})
                for depth in (2, 2, 3)
            )

    model = Stages()
    small = compact(model, Plan({}, {"stages.2.blocks": ListPlan(3, (0, 2))}))
    assert small.config.depths == [2, 2, 2] and small.num_layers == 3 and model.config.depths == [2, 2, 3]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 4, norm_first=True), 3, enable_nested_tensor=False
    )
    assert compact(encoder, Plan({}, {"layers": ListPlan(3, (1,))})).num_layers == 1


def test_encoder_and_decoder_are_counted_by_name() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(num_layers=3, num_decoder_layers=3, inner=SimpleNamespace(depth=3))
            self.encoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.decoder = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    del (model := Both()).config.inner.depth
    model.config.inner.decoder_layers = 3
    small = compact(model, Plan({}, {"decoder": ListPlan(3, (2,))}))
    assert small.config.num_layers == 3 and small.config.num_decoder_layers == 1
    assert small.config.inner.decoder_layers == 1 and model.config.inner.decoder_layers == 3
