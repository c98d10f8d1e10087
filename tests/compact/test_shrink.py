"""Surgery on the live model: the same objects, smaller, equal to a model built at that size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compact.networks import KEPT, Chain, chain, chain_plan, mask_chain, plan_for, sizes, unchanged
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.two_tensor import TwoTensor

from sparsekern.compact import Plan, TensorPlan, compact, load, plan_of, save, shrink, verify

INPUT = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "NAdam": lambda params: torch.optim.NAdam(params),
    "Adafactor": lambda params: torch.optim.Adafactor(params),
    "Rprop": lambda params: torch.optim.Rprop(params),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    model(INPUT).square().sum().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def test_the_live_model_becomes_the_compact_one_in_the_same_objects() -> None:
    model = mask_chain(chain())
    expected = compact(model, chain_plan(model))
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    modules = [id(module) for module in model.modules()]
    shrink(model, chain_plan(model))
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert [id(module) for module in model.modules()] == modules
    for (name, ours), (_, theirs) in zip(model.named_modules(), expected.named_modules(), strict=True):
        assert sizes(ours) == sizes(theirs), name
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert verify(model, expected, INPUT) == 0
    assert plan_of(model) == chain_plan(chain())


def test_a_shrunk_model_is_saved_shrunk_again_and_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    model = mask_chain(chain(), (0, 4))
    whole = compact(model, Plan({}))
    shrink(model, chain_plan(model))
    shrink(model, chain_plan(model, (0, 2)))
    save(model, tmp_path / "model")
    loaded = load(Chain(), tmp_path / "model")
    assert verify(model, loaded, INPUT) == 0
    assert verify(whole, loaded, INPUT) < 1e-14
    assert plan_of(loaded) == chain_plan(chain(), (0, 4))


def test_hooks_on_parameters_and_an_old_graph_go_through_it() -> None:
    model = mask_chain(chain())
    seen: list[tuple[str, tuple[int, ...]]] = []
    weight = model.stem.weight
    weight.register_hook(lambda grad: seen.append(("tensor", tuple(grad.shape))))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", tuple(p.grad.shape))))
    model.stem.register_forward_hook(lambda *_: seen.append(("forward", ())))
    old = model(INPUT).square().sum()
    old.backward(retain_graph=True)
    seen.clear()
    shrink(model, chain_plan(model))
    assert tuple(weight.grad.shape) == (5, 3, 3, 3)
    model.zero_grad()
    step(model)
    assert seen == [("forward", ()), ("tensor", (5, 3, 3, 3)), ("after", (5, 3, 3, 3))]
    expected = compact(model, Plan({}))
    step(expected)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_gradients_are_cut_as_their_parameters() -> None:
    model = mask_chain(chain())
    step(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    shrink(model, chain_plan(model))
    for name, part in chain_plan(chain()).tensors.items():
        if name in before:
            assert torch.equal(dict(model.named_parameters())[name].grad, sliced(before[name], part))


def sliced(tensor: Tensor, part: TensorPlan) -> Tensor:
    for dim, kept in part.keep.items():
        if tensor.shape[dim] != 1:
            tensor = tensor.index_select(dim, torch.from_numpy(kept.copy()))
    return tensor


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizer_state_is_exactly_the_kept_slices(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    model = mask_chain(chain())
    optimizer = make(list(model.parameters()))
    for _ in range(3):
        step(model, optimizer)
    groups, state = optimizer.param_groups, optimizer.state
    names = {id(p): name for name, p in model.named_parameters()}
    before = {
        names[id(p)]: {key: v.clone() if isinstance(v, Tensor) else v for key, v in entry.items()}
        for p, entry in state.items()
    }
    held = {(names[id(p)], key): v for p, entry in state.items() for key, v in entry.items()}
    shrink(model, chain_plan(model), optimizer=optimizer)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    plan = chain_plan(chain())
    checked = 0
    for param, entry in state.items():
        name = names[id(param)]
        part = plan.tensors.get(name, TensorPlan(()))
        for key, value in entry.items():
            old = before[name][key]
            if not isinstance(value, Tensor) or value.numel() == 1:
                assert value == old
                continue
            assert value is held[name, key]
            assert torch.equal(value, sliced(old, part) if part.keep else old), (name, key)
            checked += bool(part.keep)
    assert checked >= 7
    step(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters())


class PerRow(torch.optim.SGD):
    """Keeps one number per row, in one dimension."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = p.grad.flatten(1).norm(dim=1) if p.dim() > 1 else p.grad.abs()
        return super().step(closure)


def test_state_of_another_shape_is_an_error_and_changes_nothing() -> None:
    model = mask_chain(chain())
    optimizer = PerRow(model.parameters(), lr=0.01)
    step(model, optimizer)
    message = (
        r"^optimizer: got a PerRow whose state 'rows' of parameter 'stem.weight' \[8, 3, 3, 3\] is a "
        r"tensor of shape \[8\], expected the parameter's shape; pass a state_cutter that cuts it$"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        shrink(model, chain_plan(model), optimizer=optimizer)


def test_state_of_another_shape_is_cut_by_the_caller() -> None:
    model = mask_chain(chain())
    optimizer = PerRow(model.parameters(), lr=0.01)
    step(model, optimizer)
    before = optimizer.state[model.stem.weight]["rows"].clone()
    asked = []

    def cutter(param: Tensor, name: str, value: Tensor, part: TensorPlan) -> Tensor:
        asked.append((tuple(param.shape), name, tuple(value.shape)))
        return value[torch.from_numpy(part.keep[0].copy())] if 0 in part.keep else value

    shrink(model, chain_plan(model), optimizer=optimizer, state_cutter=cutter)
    assert ((8, 3, 3, 3), "rows", (8,)) in asked
    assert torch.equal(optimizer.state[model.stem.weight]["rows"], before[list(KEPT)])
    step(model, optimizer)


@pytest.mark.parametrize("wrap", [AveragedModel, torch.compile, lambda m: m], ids=["ema", "compiled", "bare"])
def test_copies_are_cut_alike(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = mask_chain(chain())
    copied = wrap(mask_chain(chain()))
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(0.5)
    expected = compact(copied.module if isinstance(copied, AveragedModel) else copied, chain_plan(model))
    shrink(model, chain_plan(model), also=[copied])
    for ours, theirs in zip(copied.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if isinstance(copied, AveragedModel):
        copied.update_parameters(model)
        assert verify(copied.module, model, INPUT) == 0
        assert plan_of(copied.module) == chain_plan(chain())


def test_what_is_no_copy_is_refused_and_nothing_is_changed() -> None:
    model, other = mask_chain(chain()), chain()
    other.stem = nn.Conv2d(3, 9, 3)
    cases: list[tuple[Any, type[Exception], str]] = [
        (nn.Linear(2, 2), ValueError, r"^also\[1\]: got a Linear without act.weight, depth.bias"),
        (other, ValueError, r"^also\[1\]: got a module of other sizes, .*'stem.weight' has shape"),
        (model, ValueError, r"^also\[1\]: got a module that shares tensors with the model"),
        ("ema", TypeError, r"^also\[1\]: got str, expected an nn.Module"),
    ]
    fine = chain()
    for wrong, kind, message in cases:
        with unchanged(model), unchanged(fine), pytest.raises(kind, match=message):
            shrink(model, chain_plan(model), also=[fine, wrong])


def test_a_layer_whose_sizes_cannot_follow_is_refused_before_anything_changes() -> None:
    model = chain()
    plan = plan_for(model, {"stem.weight": {0: [0, 1]}, "norm.weight": {0: [0, 1]}})
    with unchanged(model), pytest.raises(ValueError, match="plan: norm.weight keeps 2 of 8, expected 8"):
        shrink(model, plan)


def test_memory_formats_ties_and_frozen_parameters_stay() -> None:
    model = mask_chain(chain()).to(memory_format=torch.channels_last)
    model.depth.weight.requires_grad_(False)
    model.tied = model.stem
    shrink(model, chain_plan(model))
    assert model.tied.weight is model.stem.weight
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.depth.weight.requires_grad
    assert model.stem.weight.untyped_storage().nbytes() == 5 * 27 * 8


def test_a_compiled_model_is_compiled_once_more_however_often_it_shrinks() -> None:
    model = mask_chain(chain(), (0, 1))
    compiles = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiles.append(len(inputs))
        return graph

    compiled = torch.compile(model, backend=backend)
    expected = model(INPUT)
    left, count = 8, 1
    compiled(INPUT)
    assert len(compiles) == 1
    # More often than torch.compile tolerates recompiles of one function.
    limit, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 3
    try:
        while left > 2:
            left, count = left - 1, count + 1
            shrink(compiled, chain_plan(model, tuple(range(left))))
            for _ in range(3):
                torch.testing.assert_close(compiled(INPUT), expected)
            assert len(compiles) == count
    finally:
        torch._dynamo.config.recompile_limit = limit


def test_many_plans_at_random() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        kept = tuple(sorted(random.choice(8, size=random.integers(1, 9), replace=False).tolist()))
        model = mask_chain(chain(), kept)
        expected = compact(model, chain_plan(model, kept))
        shrink(model, chain_plan(model, kept))
        assert verify(model, expected, INPUT) == 0


def test_a_plan_for_the_whole_model_says_what_is_left_of_a_shrunk_one() -> None:
    model = mask_chain(chain(), (0, 4))
    plan = chain_plan(model, (0, 4))
    expected = compact(model, plan)
    shrink(model, chain_plan(model, (0, 2, 4, 7)))
    assert verify(compact(model, plan), expected, INPUT) == 0
    assert plan_of(compact(model, plan)) == plan
    with pytest.raises(ValueError, match="plan: got a plan for a model whose 'stem.weight'"):
        compact(model, chain_plan(chain(), (0, 5)))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_cut_often_or_once_a_weight_has_the_strides_that_its_format_gives(form: torch.memory_format) -> None:
    model = mask_chain(chain(), (0, 1)).to(memory_format=form)
    for left in (6, 5, 3, 2):
        shrink(model, chain_plan(model, tuple(range(left))))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            expected = torch.empty(parameter.shape, memory_format=form).stride()
            assert parameter.stride() == expected, name


def reparametrised() -> Chain:
    model = chain()
    nn.utils.parametrizations.weight_norm(model.stem)
    prune.l1_unstructured(model.depth, "weight", amount=0.3)
    return model


def test_reparametrised_weights_follow() -> None:
    model, plan = reparametrised(), {}
    for name, tensor in model.state_dict().items():
        if name.partition(".")[0] in ("stem", "norm", "depth", "act") and tensor.ndim:
            plan[name] = {0: KEPT}
    whole = plan_for(model, {**plan, "up.weight": {0: KEPT}})
    expected = compact(model, whole)
    shrink(model, whole)
    assert verify(model, expected, INPUT) == 0
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    assert model.depth.weight.shape == (5, 1, 3, 3)


def test_wrapped_tensors_are_refused() -> None:
    model = chain()
    data = model.stem.weight.detach()
    model.stem.weight = nn.Parameter(TwoTensor(data, data.clone()))
    message = "^model: got a TwoTensor as 'stem.weight', expected plain tensors: sharded"
    with pytest.raises(ValueError, match=message):
        shrink(model, chain_plan(model))
    assert model.norm.weight.shape == (8,)
