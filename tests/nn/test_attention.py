"""Attention whose heads go: torch's numerics while whole, masked output == compact output when cut."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph.exactness import check, choose, difference, mask, randomise
from torch import Tensor, nn

import sparsekern.optim
from sparsekern.compact import compact, load, make_plan, save, shrink
from sparsekern.graph import trace
from sparsekern.nn import MultiheadAttention

WIDTH, HEADS = 12, 3


def tensors(*shape: int, count: int = 1, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def pair(**options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module, and a copy of it that was adopted."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = copy.deepcopy(theirs)
    assert MultiheadAttention.fits(ours)
    MultiheadAttention.adopt(ours)
    assert isinstance(ours, MultiheadAttention)
    return theirs, ours


def assert_alike(theirs: Any, ours: Any) -> None:
    for want, got in zip(theirs, ours, strict=True):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


PADDING = torch.tensor([[False, False, True, False, True], [False, True, False, False, False]])
SQUARE = torch.ones(4, 5, dtype=torch.bool).triu(2)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "square", "added", "both", "by head"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_computes_what_torch_computes(need_weights: bool, masks: str, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    query, key, value = tensors(2, 4, WIDTH) + tensors(2, 5, WIDTH, count=2, seed=2)
    options = {
        "none": {},
        "padding": {"key_padding_mask": PADDING},
        "square": {"attn_mask": SQUARE},
        "added": {"attn_mask": tensors(4, 5)[0]},
        "both": {"attn_mask": SQUARE, "key_padding_mask": PADDING},
        "by head": {"attn_mask": tensors(2 * HEADS, 4, 5)[0]},
    }[masks]
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    for averaged in (False, True):
        given = dict(options, need_weights=need_weights, average_attn_weights=averaged)
        assert_alike(theirs(query, key, value, **given), ours(query, key, value, **given))


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 5, "vdim": 7}, {"batch_first": True}])
@pytest.mark.parametrize("batched", [False, True])
def test_shapes_of_torch(options: dict[str, Any], batched: bool) -> None:
    theirs, ours = pair(**options)
    shape = (4, 2) if batched else (4,)
    inputs = [
        tensors(*shape, size, seed=size)[0]
        for size in (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    ]
    assert_alike(theirs(*inputs), ours(*inputs))
    x = tensors(*shape, WIDTH)[0]
    if "kdim" not in options:
        assert_alike(theirs(x, x, x), ours(x, x, x))


def test_causal_hint_and_gradients() -> None:
    theirs, ours = pair(batch_first=True)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for module in (theirs, ours):
        x = tensors(2, 4, WIDTH)[0]
        module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0].square().sum().backward()
    for want, got in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-10)


def test_state_dicts_go_both_ways() -> None:
    theirs, ours = pair()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_refuses_what_it_cannot_do() -> None:
    _, ours = pair(batch_first=True)
    x = tensors(2, 4, WIDTH)[0]
    with pytest.raises(ValueError, match="query: got 4 dimensions, expected 2 or 3"):
        ours(x[None], x[None], x[None])
    with pytest.raises(RuntimeError, match="is_causal: got True without attn_mask"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"mask: got torch.int64, expected bool or a floating point type"):
        ours(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.int64))
    nested = torch.nested.nested_tensor([x[0], x[1, :2]])
    with pytest.raises(ValueError, match="query: got a nested tensor, expected a padded one"):
        ours(nested, nested, nested)


class Net(nn.Module):
    """Attention over itself or over something else, between a layer and a head."""

    def __init__(self, *, need_weights: bool = False, other: bool = False, **options: Any) -> None:
        super().__init__()
        self.up = nn.Linear(4, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 2)
        self.need_weights, self.other = need_weights, other

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        key = y.flip(1) if self.other else y
        return self.head(y + self.attention(y, key, key, need_weights=self.need_weights)[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_heads_go_whole(need_weights: bool, other: bool, bias: bool) -> None:
    net = Net(need_weights=need_weights, other=other, bias=bias)
    graph = check(net, tensors(2, 5, 4), share=0.4)
    heads = {g.name: len(g.channels) for g in graph.groups}
    assert heads == {"up": WIDTH, "attention": HEADS}


def test_other_widths_of_keys_and_values() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, WIDTH), nn.Linear(4, 6), nn.Linear(4, 8)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=8, batch_first=True)
            self.head = nn.Linear(WIDTH, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(self.q(x), self.k(x), self.v(x))[0])

    graph = check(Across(), tensors(2, 5, 4))
    assert sorted(len(g.channels) for g in graph.groups) == [HEADS, 6, 8, WIDTH, WIDTH]


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_transformer_takes_no_shortcut_around_fewer_heads(norm_first: bool) -> None:
    heads = 4  # torch's nested tensors want an even number
    layer = nn.TransformerEncoderLayer(
        WIDTH, heads, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    model = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    (x,) = tensors(2, 5, WIDTH)
    graph = trace(model, x)
    kept = choose(graph, 0)
    masked, small = mask(model, graph, kept), compact(model, make_plan(graph, kept))
    assert all(layer.self_attn.num_heads < heads for layer in small.layers)
    assert masked.use_nested_tensor is not norm_first and not small.use_nested_tensor
    assert difference(masked, small, (x,)) < 1e-12
    with torch.no_grad():
        padded = [net.eval()(x, src_key_padding_mask=PADDING) for net in (masked, small)]
    seen = ~PADDING  # torch leaves zeros where its nested tensors have nothing
    torch.testing.assert_close(padded[1][seen], padded[0][seen], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_a_key_of_every_head_leaves_them_alone(options: dict[str, Any]) -> None:
    graph = check(Net(**options), tensors(2, 5, 4))
    assert "attention" not in {g.name for g in graph.groups}
    assert "sizes cannot be changed" in str(graph.explain("attention.in_proj_weight"))


def test_weights_that_are_returned_keep_their_heads() -> None:
    class Shown(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.up(x)
            return self.attention(y, y, y, average_attn_weights=False)

    graph = trace(Shown().double(), tensors(2, 5, 4)[0])
    assert "attention" not in {g.name for g in graph.groups}


def halved() -> tuple[Net, nn.Module, Any]:
    torch.manual_seed(0)
    net = randomise(Net())
    assert isinstance(net, Net)
    graph = trace(net, tensors(2, 5, 4)[0])
    kept = np.ones(graph.num_channels, bool)
    heads = next(g.channels for g in graph.groups if g.name == "attention")
    kept[heads[1]] = False
    plan = make_plan(graph, kept)
    return net, mask(net, graph, kept), plan


def test_file_pickle_and_copy(tmp_path: Path) -> None:
    net, masked, plan = halved()
    small = compact(masked, plan)
    save(small, tmp_path / "small.safetensors")
    loaded = load(copy.deepcopy(net), tmp_path / "small.safetensors")
    for again in (loaded, pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert again.attention.num_heads == HEADS - 1
        assert difference(masked, again, tensors(2, 5, 4)) < 1e-12


def test_exports_and_compiles() -> None:
    _, masked, plan = halved()
    small = compact(masked, plan).eval()
    (x,) = tensors(2, 5, 4)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), masked.eval()(x), rtol=1e-12, atol=1e-12)
    compiled = torch.compile(small, backend="aot_eager")
    torch.testing.assert_close(compiled(x), masked(x), rtol=1e-12, atol=1e-12)


def test_shrinks_in_place_and_again() -> None:
    net, masked, plan = halved()
    net.load_state_dict(masked.state_dict())
    attention = net.attention
    optimizer = sparsekern.optim.AdamW(net.parameters())
    (x,) = tensors(2, 5, 4)
    net(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    net.load_state_dict(masked.state_dict())
    shrink(net, plan, optimizer=optimizer)
    assert net.attention is attention and attention.num_heads == HEADS - 1
    assert optimizer.state[attention.in_proj_weight]["exp_avg"].shape == attention.in_proj_weight.shape
    assert difference(masked, net, (x,)) < 1e-12
    graph = trace(net, x)
    assert [len(g.channels) for g in graph.groups if g.name == "attention"] == [HEADS - 1]


def test_a_plan_with_parts_of_heads_is_refused_and_changes_nothing() -> None:
    net, _, plan = halved()
    part = plan.tensors["attention.in_proj_weight"]
    rows = np.delete(np.arange(3 * WIDTH), [0, WIDTH, 2 * WIDTH])
    wrong = type(plan)({"attention.in_proj_weight": type(part)(part.shape, {0: rows})})
    with pytest.raises(ValueError, match="keeps parts of the heads of 'attention', expected whole ones"):
        shrink(net, wrong)
    assert type(net.attention) is nn.MultiheadAttention and net.attention.num_heads == HEADS
