"""Trying out training steps on copies: how long they take, and what an optimizer keeps."""

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
"""The loss of a model on some inputs, with a graph to go backward through."""

# Rounds in which copies take turns, after one that is not counted: at least so many, and more within seconds.
_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 20, 4.0


def mean_square(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Loss:
    """The mean square of all outputs on these arguments: a loss that any model has."""

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
    """The loss that ``measure`` of :meth:`sparsekern.Pruner.forecast` means, None for no timing.

    Args:
        example: positional and keyword arguments of ``model``, for ``True``.

    Raises:
        TypeError: ``forward_loss`` is no function.
        ValueError: it comes without a batch.
    """
    check_losses(None, forward_loss)
    is_function = callable(measure) and not isinstance(measure, Tensor)
    if forward_loss is not None:
        if measure is None or isinstance(measure, bool) or is_function:
            raise ValueError(
                f"measure: got {measure!r} with forward_loss, expected the batch that forward_loss takes"
            )
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
        optimizer: a copy as before its first step.

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
        """Forward, backward, and step of the optimizer.

        Raises:
            ValueError: that fails.
        """
        try:
            self._loss(self.model).backward()
            self.optimizer.step()
        except Exception as error:
            raise ValueError(f"measure: a step on these inputs fails: {error}") from error
        self.optimizer.zero_grad()


@contextmanager
def trying(model: nn.Module) -> Iterator[list[torch.device]]:
    """The random generators are as before afterwards; yields the devices to wait for."""
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield devices


def time_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, plans: Sequence[Plan], loss: Loss
) -> list[list[float]]:
    """Seconds of forward, backward and optimizer step of compact copies, in several rounds.

    The copies take turns, so that a slower spell of the machine hits all of them.

    Returns:
        Per plan the seconds of every round.

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
    """Bytes of the state of its parameters' shapes that an optimizer keeps once it has made a step.

    Found by a step of a copy with parameters of the same number of dimensions, two elements each.

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
        raise ValueError(f"optimizer: a copy of {type(optimizer).__name__} cannot step: {error}") from error
    total = 0
    for param in params:
        own = tiny[id(param)]
        state = [value for value in probe.state.get(own, {}).values() if isinstance(value, Tensor)]
        alike = [value for value in state if value.shape == own.shape and value.dim()]
        total += sum(param.numel() * value.element_size() for value in alike)
    return total


def copy_of(optimizer: torch.optim.Optimizer, replaced: Mapping[int, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer as it is before its first step, of other parameters, without hooks.

    Args:
        optimizer: stays as it is.
        replaced: the other parameters, by ``id`` of those that they stand for.

    Raises:
        TypeError: it holds a module, of which only the training has the right one.
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
    # What a class adds to torch's own attributes, such as LBFGS its list of parameters.
    known: dict[int, Any] = {id(optimizer): own, id(optimizer.state): own.state} | dict(replaced)
    for name, value in vars(optimizer).items():
        if hasattr(own, name) or callable(value):
            continue
        if isinstance(value, nn.Module):
            raise TypeError(f"optimizer: {type(optimizer).__name__} holds a module in {name!r}")
        setattr(own, name, copy.deepcopy(value, known))
    return own
