"""Trial steps: training steps of copies, to measure their time and the size of an optimizer's state."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.compact import Plan, compact
from sparsekern.compact.verify import as_arguments, leaves
from sparsekern.graph.capture.hooks import drop_hooks
from sparsekern.prune.calibration import ForwardLoss, check_losses, moved

Loss = Callable[[nn.Module], Tensor]
"""Computes the loss of a model on some inputs, with a graph for the backward pass."""

# Minimal and maximal number of timed rounds, after 1 of warmup; past the minimum only within so many seconds.
_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 20, 4.0


def mean_square(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Loss:
    """A loss for any model: the mean square of all outputs on these arguments."""

    def loss(model: nn.Module) -> Tensor:
        outputs = [leaf for _, leaf in leaves(model(*inputs, **kwargs)) if isinstance(leaf, Tensor)]
        total = sum(leaf.float().square().mean() for leaf in outputs if leaf.requires_grad)
        assert isinstance(total, Tensor)
        return total

    return loss


def loss_to_time(
    measure: Any,
    forward_loss: ForwardLoss | None,
    example: tuple[tuple[Any, ...], Mapping[str, Any]],
    model: nn.Module,
) -> Loss | None:
    """The loss for ``measure`` of :meth:`sparsekern.Pruner.forecast`, None for no timing.

    Args:
        measure, forward_loss: as for :meth:`sparsekern.Pruner.forecast`.
        example: positional and keyword arguments of ``model``, used if ``measure`` is True.
        model: gives the device of the batch.

    Raises:
        TypeError: ``forward_loss`` is not a function.
        ValueError: ``forward_loss`` comes without a batch.
    """
    check_losses(None, forward_loss)
    is_function = callable(measure) and not isinstance(measure, Tensor)
    if forward_loss is not None:
        if measure is None or isinstance(measure, bool) or is_function:
            raise ValueError(f"measure: got {measure!r} with forward_loss, expected a batch for forward_loss")
        batch = moved(measure, next(model.parameters()).device)
        return lambda trial: forward_loss(trial, batch)
    if measure is None or measure is False:
        return None
    if is_function:
        return cast(Loss, measure)
    if isinstance(measure, Mapping):
        return mean_square((), dict(measure))
    return mean_square(*(example if measure is True else as_arguments(measure)))


class Trial:
    """A copy of a model that makes training steps, cut to a plan, without hooks and ``torch.compile``.

    Attributes:
        model: the copy, in training mode.
        optimizer: a copy in the state before its first step.

    Raises:
        ValueError: the optimizer cannot be copied.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, loss: Loss) -> None:
        self.model = compact(model, plan).train()
        drop_hooks(self.model)
        replaced = dict(zip(map(id, model.parameters()), self.model.parameters(), strict=True))
        self.optimizer = copy_of(optimizer, replaced)
        self._loss = loss

    def step(self) -> None:
        """Make one training step: forward, backward, and step of the optimizer.

        Raises:
            ValueError: the step fails.
        """
        try:
            self._loss(self.model).backward()
            self.optimizer.step()
        except Exception as error:
            raise ValueError(
                f"measure: got inputs on which a training step fails, expected inputs to train on: {error}"
            ) from error
        self.optimizer.zero_grad()


@contextmanager
def trying(model: nn.Module) -> Iterator[list[torch.device]]:
    """Restore the random generators at the end; yields the CUDA devices to synchronise with."""
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield devices


def time_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, plans: Sequence[Plan], loss: Loss
) -> list[list[float]]:
    """Time the forward pass, backward pass and optimizer step of compact copies, in several rounds.

    Every round runs each copy once, so that a slow period of the machine affects all of them.

    Returns:
        For each plan the seconds of every round.

    Raises:
        ValueError: the model cannot be trained with ``loss``, or its optimizer cannot be copied.
    """
    trials = [Trial(model, optimizer, plan, loss) for plan in plans]
    times: list[list[float]] = [[] for _ in trials]
    with trying(model) as devices:
        start = perf_counter()
        for number in range(_MOST_ROUNDS + 1):
            if number > _ROUNDS and perf_counter() - start > _SECONDS:
                break
            for trial, own in zip(trials, times, strict=True):
                begin = perf_counter()
                trial.step()
                for device in devices:
                    torch.cuda.synchronize(device)
                if number:
                    own.append(perf_counter() - begin)
    return times


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state after a step, as far as it has the shapes of its parameters.

    A step of a copy shows them. Its parameters have as many dimensions, of two elements each.

    Raises:
        ValueError: the optimizer cannot be copied and stepped.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tiny = {id(p): nn.Parameter(torch.zeros((2,) * p.dim(), dtype=p.dtype, device=p.device)) for p in params}
    probe = copy_of(optimizer, tiny)
    for own in tiny.values():
        own.grad = torch.zeros_like(own)
    try:
        probe.step()
    except Exception as error:
        raise ValueError(
            f"optimizer: got a {type(optimizer).__name__} whose copy cannot make a step, expected one that "
            f"can be copied: {error}"
        ) from error
    total = 0
    for param in params:
        own = tiny[id(param)]
        state = [value for value in probe.state.get(own, {}).values() if isinstance(value, Tensor)]
        alike = [value for value in state if value.shape == own.shape and value.dim()]
        total += sum(param.numel() * value.element_size() for value in alike)
    return total


def copy_of(optimizer: torch.optim.Optimizer, replaced: Mapping[int, nn.Parameter]) -> torch.optim.Optimizer:
    """A copy of an optimizer for other parameters, in the state before its first step and without hooks.

    Args:
        optimizer: the optimizer; it does not change.
        replaced: the new parameters by ``id`` of the parameters that they replace.

    Raises:
        TypeError: the optimizer holds a module, which cannot be replaced by that of the copy.
    """
    own = type(optimizer).__new__(type(optimizer))
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        | {"params": [replaced[id(p)] for p in group["params"] if id(p) in replaced]}
        for group in optimizer.param_groups
    ]
    own.__setstate__(
        {"defaults": copy.deepcopy(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups}
    )
    # Attributes that a class adds to those of torch, such as the parameter list of LBFGS.
    known: dict[int, Any] = {id(optimizer): own, id(optimizer.state): own.state} | dict(replaced)
    for name, value in vars(optimizer).items():
        if hasattr(own, name) or callable(value):
            continue
        if isinstance(value, nn.Module):
            raise TypeError(
                f"optimizer: got a {type(optimizer).__name__} that holds a module in {name!r}, expected one "
                f"without modules, which can be copied for a copy of the model"
            )
        setattr(own, name, copy.deepcopy(value, known))
    return own
