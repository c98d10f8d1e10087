from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compact.networks import KEPT, Chain, chain, chain_plan, mask_chain, plan_for, sizes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, prune

from sparsekern.compact import Plan, TensorPlan, compact, plan_of, verify

INPUT = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_compact_chain_computes_what_the_masked_one_does() -> None:
    model = mask_chain(chain())
    small = compact(model, chain_plan(model))
    assert verify(model, small, INPUT) < 1e-14
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert sizes(small.stem) == {"in_channels": 3, "out_channels": 5, "groups": 1}
    assert sizes(small.norm) == {"num_features": 5}
    assert sizes(small.depth) == {"in_channels": 5, "out_channels": 5, "groups": 5}
    assert sizes(small.act) == {"num_parameters": 5}
    assert sizes(small.up) == {"in_channels": 5, "out_channels": 6, "groups": 1}
    assert sizes(small.head) == {"in_features": 6, "out_features": 4}


def test_the_model_stays_as_it_is() -> None:
    model = chain()
    model.head.eval()
    before = copy.deepcopy(model.state_dict())
    addresses = [p.data_ptr() for p in model.parameters()]
    small = compact(model, chain_plan(model))
    for parameter in small.parameters():
        with torch.no_grad():
            parameter.zero_()
    assert [p.data_ptr() for p in model.parameters()] == addresses
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert plan_of(model).removes_nothing
    assert "_sparsekern_plan" not in vars(model)


def test_classes_modes_attributes_and_requires_grad_are_kept() -> None:
    model = chain()
    model.note = {"task": [1, 2]}
    model.stem.eval()
    model.head.bias.requires_grad_(False)
    model.up.weight.no_decay = True
    small = compact(model, chain_plan(model))
    assert [type(m) for m in small.modules()] == [type(m) for m in model.modules()]
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert small.note == model.note
    assert small.note is not model.note
    assert small.up.weight.no_decay
    for (name, old), (_, new) in zip(model.named_parameters(), small.named_parameters(), strict=True):
        assert new.requires_grad == old.requires_grad, name
        assert type(new) is nn.Parameter
        assert new.dtype == old.dtype
        assert new.is_contiguous()


def test_gradients_are_not_copied() -> None:
    model = chain()
    model(INPUT).sum().backward()
    small = compact(model, chain_plan(model))
    assert all(p.grad is None for p in small.parameters())
    assert all(p.grad is not None for p in model.parameters())
    small(INPUT).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_hooks_are_kept_and_belong_to_the_copy() -> None:
    model = mask_chain(chain())
    seen: list[nn.Module] = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(module))
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    small = compact(model, chain_plan(model))
    assert verify(model, small, INPUT) < 1e-14
    assert seen == [model.norm, small.norm]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    model = mask_chain(chain()).to(memory_format=memory_format)
    small = compact(model, chain_plan(model))
    for module in (small.stem, small.depth, small.up):
        assert module.weight.is_contiguous(memory_format=memory_format)
    assert small.up.weight.stride() == torch.empty(5, 6, 2, 2).to(memory_format=memory_format).stride()
    assert verify(model, small, INPUT) < 1e-14


class Tied(nn.Module):
    """One layer under two names, one weight in two layers, one buffer as a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.again = self.first
        self.second = nn.Linear(4, 8)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.arange(16.0))
        self.register_buffer("view", self.table[:8])
        self.all_weights = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return (self.again(x) + self.second(x)) * self.scale * self.view


def tied_plan(model: nn.Module) -> Plan:
    # The weight under its second name.
    names = ("second.weight", "first.bias", "second.bias", "scale", "view")
    return plan_for(model, {}).then(
        Plan(
            {
                name: TensorPlan(tuple(model.get_parameter(name).shape), {0: np.array(KEPT)})
                if name != "view"
                else TensorPlan((8,), {0: np.array(KEPT)})
                for name in names
            }
        )
    )


def test_ties_are_kept() -> None:
    model = Tied()
    small = compact(model, tied_plan(model))
    assert small.first is small.again
    assert small.first.weight is small.second.weight
    assert small.all_weights[0] is small.first.weight
    assert sizes(small.second) == {"in_features": 4, "out_features": 5}
    x = torch.randn(3, 4)
    torch.testing.assert_close(small(x), model(x)[:, list(KEPT)])


def test_what_is_tied_has_one_plan() -> None:
    model = Tied()
    other = TensorPlan((8, 4), {0: np.array([0])})
    plan = Plan({**tied_plan(model).tensors, "first.weight": other})
    with pytest.raises(ValueError, match=r"got different parts of 'first.weight' and 'second.weight'"):
        compact(model, plan)


class Scaled(nn.Sequential):
    """A container with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8))
        self.gamma = nn.Parameter(torch.randn(8))
        self.list = nn.ParameterList([torch.randn(8)])
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) * self.gamma * self.list[0]


def test_the_users_own_classes_keep_their_attributes() -> None:
    model = Scaled()
    names = ("0.weight", "0.bias", "gamma", "list.0")
    small = compact(model, plan_for(model, {name: {0: KEPT} for name in names}))
    assert small.width == 8
    x = torch.randn(2, 3)
    torch.testing.assert_close(small(x), model(x)[:, list(KEPT)])


def test_a_compact_model_is_compacted_again() -> None:
    model = mask_chain(chain(), (0, 4))
    first = compact(model, chain_plan(model))
    second = compact(first, chain_plan(first, (0, 2)))
    assert plan_of(first) == chain_plan(model)
    assert plan_of(second) == chain_plan(model, (0, 4))
    assert verify(model, second, INPUT) < 1e-14
    at_once = compact(model, plan_of(second))
    assert verify(second, at_once, INPUT) == 0


def test_a_compact_part_is_remembered_by_the_whole() -> None:
    model = chain()
    whole = nn.ModuleDict({"net": compact(model, chain_plan(model)), "head": nn.Linear(4, 2)})
    assert plan_of(whole) == chain_plan(model).inside("net")
    same = compact(whole, Plan({}))
    assert plan_of(same) == plan_of(whole)
    assert "_sparsekern_plan" not in vars(same["net"])


def test_an_empty_plan_copies() -> None:
    model = chain()
    same = compact(model, Plan({}))
    assert verify(model, same, INPUT) == 0
    assert plan_of(same).removes_nothing


@pytest.mark.parametrize("mode", [torch.device("meta"), FakeTensorMode()], ids=["meta", "fake"])
def test_without_memory(mode: Any) -> None:
    with mode:
        model = Chain()
    small = compact(model, chain_plan(Chain()))
    assert small.up.weight.shape == (5, 6, 2, 2)
    assert isinstance(small.up.weight, nn.Parameter)
    assert all(p.is_meta or isinstance(p, FakeTensor) for p in small.parameters())


def test_peak_memory_is_that_of_the_small_model() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 4096))
    kept = list(range(0, 4096, 64))
    names = {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.bias": {0: kept}}
    plan = plan_for(model, {**names, "1.weight": {0: kept, 1: kept}})
    with torch.profiler.profile(profile_memory=True) as profile:
        compact(model, plan)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    # 64 rows of the large weight, cut again; the model itself holds 68 MB.
    assert allocated < 3e6


def test_weight_norm_goes_by_the_names_of_its_tensors() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 2, 3, bias=False))
    prefix = "0.parametrizations.weight"
    rows = (f"{prefix}.original0", f"{prefix}.original1", "0.bias")
    with torch.no_grad():
        for name in (rows[0], rows[2]):
            model.get_parameter(name)[[1, 2, 6]] = 0
    plan = plan_for(model, {**{name: {0: KEPT} for name in rows}, "1.weight": {1: KEPT}})
    small = compact(model, plan)
    assert sizes(small[0]) == {"in_channels": 3, "out_channels": 5, "groups": 1}
    assert verify(model, small, torch.randn(1, 3, 8, 8)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_computed_weights_follow_their_sources(kind: str) -> None:
    layer = nn.Conv2d(3, 8, 3)
    if kind == "prune":
        prune.random_unstructured(layer, "weight", 0.3)
        rows = ("weight_orig", "weight_mask", "bias")
    else:
        nn.utils.weight_norm(layer)
        rows = ("weight_g", "weight_v", "bias")
    x = torch.randn(1, 3, 5, 5)
    layer(x)  # leaves a result of autograd behind as layer.weight
    small = compact(layer, plan_for(layer, {name: {0: KEPT} for name in rows}))
    assert sizes(small) == {"in_channels": 3, "out_channels": 5, "groups": 1}
    torch.testing.assert_close(small(x), layer(x)[:, list(KEPT)])


def test_a_kept_feature_map_is_no_obstacle() -> None:
    model = mask_chain(chain())
    model.norm.register_forward_hook(lambda m, args, output: setattr(m, "last", output))
    model(INPUT)
    small = compact(model, chain_plan(model))
    assert verify(model, small, INPUT) < 1e-14
    assert small.norm.last.shape[1] == 5


def test_the_module_inside_a_compiled_one_is_copied() -> None:
    model = mask_chain(chain())
    small = compact(torch.compile(model, backend="eager"), chain_plan(model))
    assert type(small) is Chain
    assert verify(model, small, INPUT) < 1e-14


def test_graph_modules_are_copied() -> None:
    model = mask_chain(chain())
    small = compact(torch.fx.symbolic_trace(model), chain_plan(model))
    assert verify(model, small, INPUT) < 1e-14


class Stubborn(nn.Linear):
    """Copies itself without using the memo that replaces its tensors."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Stubborn:
        return Stubborn(self.in_features, self.out_features)


class Locked(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Locked:
        raise RuntimeError("not to be copied")


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))


def misfits() -> Iterator[tuple[Any, Any, type[Exception], str]]:
    model = Chain()
    good = chain_plan(model)
    yield model, {"stem.weight": [0]}, TypeError, "plan: got dict, expected a Plan"
    yield [model], good, TypeError, "model: got list, expected an nn.Module"
    yield (
        Tied(),
        good,
        ValueError,
        r"plan: got a plan for another model with act.weight, .* and 4 more",
    )
    yield (
        compact(model, chain_plan(model, (0, 1, 2, 3, 4))),
        good,
        ValueError,
        r"plan: got a plan for a model whose 'stem.weight' has shape \[8, 3, 3, 3\], expected "
        r"\[5, 3, 3, 3\] as in this model",
    )
    yield nn.Sequential(nn.LazyLinear(3)), Plan({}), ValueError, "model: got '0.weight' without values"
    yield (
        Stubborn(2, 2),
        Plan({}),
        ValueError,
        "model: got a Stubborn whose copy has other tensors .*__deepcopy__",
    )
    yield (
        Locked(2, 2),
        Plan({}),
        ValueError,
        "model: got a Locked that copy.deepcopy cannot copy.*: not to be",
    )
    yield scripted(), Plan({}), ValueError, "model: got a .* as 0, expected the module before scripting"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("number", range(8))
def test_what_does_not_fit_is_refused(number: int) -> None:
    model, plan, kind, message = list(misfits())[number]
    with pytest.raises(kind, match=message):
        compact(model, plan)


def test_sparse_parameters_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"got 'weight' of layout torch.sparse_coo, expected a dense tensor"):
        compact(model, Plan({}))


def test_bound_hooks_and_partials_of_the_model_point_at_the_copy() -> None:
    model = mask_chain(chain())
    model.helper = functools.partial(Chain.forward, model)
    small = compact(model, chain_plan(model))
    assert small.helper.args[0] is small
