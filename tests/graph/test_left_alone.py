"""Tracing, pruning and compacting leave all objects of the user unchanged."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sparsekern
from sparsekern.compact import make_plan
from sparsekern.graph import trace

X = torch.zeros(4, 3, 8, 8)
SEEN: list[object] = []


def observe(*arguments: object) -> None:
    SEEN.append(arguments)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    SEEN.append(module)
    return output * 2


class Body(nn.Module):
    """Two convolutions with common layers between them. calls: the number of forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head: nn.Module = nn.Conv2d(8, 2, 1)
        self.calls = 0
        self.between: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.between(self.drop(self.norm(self.stem(x))))
        return self.head(self.body(x).relu())


class Scaled(nn.Module):
    """By numbers of all generators."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (random.random() + np.random.rand()) * torch.rand(1)


def plain() -> Body:
    return Body()


def partly_frozen() -> Body:
    model = Body().to(memory_format=torch.channels_last)
    model.norm.eval()
    model.stem.bias.requires_grad_(False)
    model.body.weight.grad = torch.ones_like(model.body.weight)
    return model.eval()


def tied() -> Body:
    model = Body()
    more = nn.Conv2d(8, 8, 3, padding=1)
    more.weight = model.body.weight
    model.between = nn.Sequential(more, nn.ReLU())
    return model


def with_buffers() -> Body:
    model = Body()
    model.register_buffer("scale", torch.rand(8, 1, 1))
    model.register_buffer("count", torch.tensor(3), persistent=False)
    return model


def by_chance() -> Body:
    model = Body()
    model.between = Scaled()
    return model


def reparametrised() -> Body:
    model = Body()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.head)
    model.head = nn.Sequential(model.head, nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)))
    return model


def hooked() -> Body:
    model = Body()
    for module in model.modules():
        module.register_forward_pre_hook(observe)
        module.register_forward_hook(observe)
        module.register_full_backward_hook(observe)
        module.register_full_backward_pre_hook(observe)
    model.body.register_forward_hook(double, prepend=True)
    model.body.register_forward_pre_hook(observe, with_kwargs=True)
    model.register_state_dict_post_hook(observe)
    return model


MODELS = [plain, partly_frozen, tied, with_buffers, by_chance, reparametrised, hooked]


def traced(model: nn.Module) -> None:
    assert trace(model, X).num_channels


def pruned(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = sparsekern.Pruner(model, optimizer, X, keep=0.8, of="params", steps=10)
    # While it watches, load hooks are registered; nothing else of the model changes.
    pruner.detach()


def compacted(model: nn.Module) -> None:
    graph = trace(model, X)
    kept = np.ones(graph.num_channels, bool)
    kept[graph.groups[0].channels[1:]] = False
    sparsekern.compact(model, make_plan(graph, kept))


def state(model: nn.Module) -> dict[str, Any]:
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
        *(
            (f"{n}.{k}", v)
            for n, m in model.named_modules()
            for k, v in vars(m).items()
            if isinstance(v, Tensor)
        ),
    ]
    return {
        "tensors": {
            name: (
                id(t),
                t.data_ptr(),
                t.stride(),
                t.requires_grad,
                id(t.grad) if t.is_leaf else 0,
                t.tolist(),
            )
            for name, t in tensors
        },
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [(key, id(hook)) for key, hook in table.items()]
            for module in model.modules()
            for name, table in vars(module).items()
            if name.endswith("_hooks")
        ],
        "attributes": [
            {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, (int, float, str, tuple))
            }
            for module in model.modules()
        ],
        "names": [sorted(vars(module)) for module in model.modules()],
        "generators": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            [np.asarray(part).tolist() for part in np.random.get_state()],
        ),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "calls": len(SEEN),
    }


@pytest.mark.parametrize("act", [traced, pruned, compacted])
@pytest.mark.parametrize("make", MODELS)
def test_nothing_of_the_model_changes(
    make: Callable[[], nn.Module], act: Callable[[nn.Module], None]
) -> None:
    SEEN.clear()
    model = make()
    before = state(model)
    act(model)
    after = state(model)
    for part in before:
        assert after[part] == before[part], part


def test_hooks_that_return_nothing_cost_no_channels() -> None:
    model = Body()
    channels = trace(model, X).num_channels
    for module in model.modules():
        module.register_forward_hook(observe)
    assert trace(model, X).num_channels == channels
    assert not SEEN


def test_what_a_hook_may_change_stays() -> None:
    model = Body()
    model.body.register_forward_hook(double)
    graph = trace(model, X)
    assert [group.name for group in graph.groups] == ["stem"]
    assert dict(graph.frozen)["body.weight"] == "a hook of body may change it"


def test_hooks_for_all_modules_are_not_called() -> None:
    SEEN.clear()
    handle = nn.modules.module.register_module_forward_hook(observe)
    try:
        trace(Body(), X)
        assert not SEEN
        Body()(X)
        assert SEEN
    finally:
        handle.remove()
