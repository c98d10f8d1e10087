"""Trying out training steps on copies: how long they take, and what an optimizer keeps."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.compact import Plan, compact
from sparsekern.compact.verify import leaves
from sparsekern.graph.hooks import drop_hooks

# Rounds in which the copies take turns, after one that is not counted.
_ROUNDS = 5


def time_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, plans: Sequence[Plan], inputs: tuple[Any, ...]
) -> list[list[float]]:
    """Seconds of forward, backward and optimizer step of compact copies, in several rounds.

    The copies take turns, so that a slower spell of the machine hits all of them. They run without hooks and
    without ``torch.compile``, in training mode; the loss is the mean square of all outputs.

    Returns:
        Per plan the seconds of every round.

    Raises:
        ValueError: the model cannot be trained on ``inputs``, or its optimizer cannot be copied.
    """
    runs = [_run_of(model, optimizer, plan, inputs) for plan in plans]
    times: list[list[float]] = [[] for _ in runs]
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices), torch.enable_grad():
        for number in range(_ROUNDS + 1):
            for run, own in zip(runs, times, strict=True):
                begin = perf_counter()
                run()
                for device in devices:
                    torch.cuda.synchronize(device)
                if number:
                    own.append(perf_counter() - begin)
    return times


def _run_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, inputs: tuple[Any, ...]
) -> Callable[[], None]:
    small = compact(model, plan).train()
    drop_hooks(small)
    replaced = dict(zip(map(id, model.parameters()), small.parameters(), strict=True))
    stepper = _copy_of(optimizer, replaced)

    def run() -> None:
        try:
            outputs = [leaf for _, leaf in leaves(small(*inputs)) if isinstance(leaf, Tensor)]
            loss = sum(leaf.float().square().mean() for leaf in outputs if leaf.requires_grad)
            assert isinstance(loss, Tensor)
            loss.backward()
            stepper.step()
        except Exception as error:
            raise ValueError(f"measure: a step on these inputs fails: {error}") from error
        stepper.zero_grad()

    return run


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state of its parameters' shapes that an optimizer keeps once it has made a step.

    Found by a step of a copy with parameters of the same number of dimensions, two elements each.

    Raises:
        ValueError: the optimizer cannot be copied and stepped.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tiny = {id(p): nn.Parameter(torch.zeros((2,) * p.dim(), dtype=p.dtype, device=p.device)) for p in params}
    probe = _copy_of(optimizer, tiny)
    for own in tiny.values():
        own.grad = torch.zeros_like(own)
    try:
        probe.step()
    except Exception as error:
        raise ValueError(f"optimizer: a copy of {type(optimizer).__name__} cannot step: {error}") from error
    total = 0
    for param in params:
        own = tiny[id(param)]
        state = [value for value in probe.state.get(own, {}).values() if isinstance(value, Tensor)]
        alike = [value for value in state if value.shape == own.shape and value.dim()]
        total += sum(param.numel() * value.element_size() for value in alike)
    return total


def _copy_of(optimizer: torch.optim.Optimizer, replaced: Mapping[int, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer as it is before its first step, of other parameters, without hooks."""
    own = type(optimizer).__new__(type(optimizer))
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        | {"params": [replaced[id(p)] for p in group["params"] if id(p) in replaced]}
        for group in optimizer.param_groups
    ]
    own.__setstate__(
        {"defaults": copy.deepcopy(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups}
    )
    return own
