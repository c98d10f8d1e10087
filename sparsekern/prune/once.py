"""One-shot pruning of a trained network, whose training did not use this package."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern import latency
from sparsekern.compact import Plan, compact, make_plan
from sparsekern.distributed.tensors import unwrap
from sparsekern.kernels.ops import channel_moments_, step_
from sparsekern.kernels.options import STATISTICS, StatisticsOptions
from sparsekern.kernels.rows import RowTable
from sparsekern.prune.calibration import Calibration, ForwardLoss, Loss
from sparsekern.prune.decide import criteria
from sparsekern.prune.decide.allocate import WITHOUT_DATA, Allocator, Problem
from sparsekern.prune.decide.budget import (
    Unit,
    check_depth,
    check_keep,
    check_unit,
    first_feasible,
    resolve_floors,
    round_to_choices,
)
from sparsekern.prune.decide.names import resolve_allocate, resolve_select
from sparsekern.prune.decide.roles import Equal, Roles, check_equal
from sparsekern.prune.prunable import prunable_graph
from sparsekern.prune.recalibrate import remeasure
from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.statistics import ChannelRows, gather, sum_weight_squares
from sparsekern.runtimes import Runtime

# Decay of the exponential means: close enough to 1 that over a few batches they equal plain means to a few %.
DECAY = 0.999


class Pruned(NamedTuple):
    """The result of :func:`prune_once`.

    Attributes:
        network: the smaller network.
        plan: the indices of the model's tensors that the network keeps.
    """

    network: nn.Module
    plan: Plan


def prune_once(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    keep: float,
    of: Unit = "macs",
    runtime: Runtime = "torch",
    select: criteria.Criterion | str | None = None,
    allocate: Allocator | str | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    forward_loss: ForwardLoss | None = None,
    batches: int = 32,
    round_to: int | str = 1,
    min_channels: int | Mapping[str, int] = 1,
    protect: Sequence[str | nn.Module | nn.Parameter] = (),
    exact: bool = True,
    equal: Equal = "auto",
    fold: bool = True,
    recalibrate: bool = True,
    depth: bool = False,
    cache: str | os.PathLike[str] | None = None,
) -> Pruned:
    """Make a smaller copy of a trained network, however it was trained.

    The function gathers statistics of gradients over ``calibration`` if the criterion uses them. It runs the
    network in evaluation mode and changes no parameter. It then chooses the channels to remove, folds
    duplicates into the channels that replace them, removes the channels, and measures the statistics of batch
    norms again. Frozen parameters are pruned like others. The model does not change: parameters, gradients,
    buffers, modes and random state stay. Without further training, expect a higher loss than with
    :class:`sparsekern.Pruner`.

    Args:
        model: the trained network (also the result of ``torch.compile``).
        example_inputs: as for :class:`sparsekern.Pruner`, and so are ``example_kwargs``, ``keep``, ``of``,
            ``runtime``, ``round_to``, ``min_channels``, ``protect``, ``exact``, ``equal``, ``depth`` and
            ``cache``.
        select: the criterion that ranks channels, or its name; default :func:`sparsekern.criteria.default`,
            which needs gradients. ``Magnitude``, ``Redundancy`` and ``Random`` need neither ``calibration``
            nor a loss.
        allocate: as for :class:`sparsekern.Pruner`. If ``select`` needs no gradients, the default is
            ``Global(balance=0.75)``, which keeps every group at 3/4 of an even cut at least.
        calibration: batches of the training data as pairs ``(inputs, targets)``, for example a DataLoader.
            Inputs are a tensor, a tuple of positional arguments or a dict of keyword arguments. If no
            gradients are needed, an element may also be the inputs alone, unless they are a pair.
        loss: ``loss(outputs, targets)`` returns the scalar to differentiate, like ``nn.CrossEntropyLoss()``.
        forward_loss: replaces ``loss`` for elements of ``calibration`` of another form, such as dicts with
            images and labels. ``forward_loss(model, batch)`` runs ``model`` and returns the scalar. Tensors
            of the batch are on the model's device.
        batches: maximal number of elements of ``calibration`` that are used.
        fold: add the columns of a removed duplicate to those of the channel that replaces it, if ``select``
            looks for duplicates. ``compact(model, plan)`` does not do this.
        recalibrate: replace the running statistics of batch norms by means over ``calibration``, if given.

    Returns:
        The network, with the classes and the mode of ``model``, and its plan.

    Raises:
        TypeError: ``loss`` or ``forward_loss`` is not a function.
        ValueError: an argument is out of range or missing, or both ``loss`` and ``forward_loss`` are given.
    """
    share, of = check_keep(keep), check_unit(of, runtime)
    select = resolve_select(select)
    allocate = resolve_allocate(allocate, None if select.needs_gradients else WITHOUT_DATA)
    given = Calibration(calibration, batches, loss, forward_loss)
    _check_calibration(select, given)
    model = unwrap(model)
    with _same_random_state():
        task = task_of(
            model,
            example_inputs,
            example_kwargs=example_kwargs,
            keep=share,
            of=of,
            runtime=runtime,
            round_to=round_to,
            min_channels=min_channels,
            protect=protect,
            exact=exact,
            depth=depth,
            equal=equal,
            cache=cache,
        )
        # From here on the code works on copies.
        work = compact(model, Plan({})).eval().requires_grad_(True)
        rows = ChannelRows(work, task.graph, {id(p) for p in work.parameters()}, decay=DECAY)
        activations = Activations(work, task.graph, counting=select.needs_activations, decay=DECAY)
        criteria.check_counted(select, activations)
        activations.attach()
        _gather_rows(work, rows.table, activations, given if select.needs_gradients else None)
        activations.detach()
        parameters = dict(work.named_parameters(remove_duplicate=False))
        statistics = gather(rows, task.graph, task.live, parameters, activations)
        saliency = criteria.saliency(select, statistics)
        kept = task.checked(allocate(replace(task, saliency=saliency)))
        partners = select.partners(statistics, saliency) if fold else None
        if partners is not None:
            Masks(task.graph, rows, parameters, lambda _: ()).fold(~kept, partners)
        plan = make_plan(task.graph, kept)
        network = compact(_restored(work, model), plan)
        if recalibrate and given and _has_norms(network):
            remeasure(network, given.passes(network))
    return Pruned(network, plan)


def task_of(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    keep: float,
    of: str,
    runtime: Runtime = "torch",
    round_to: int | str,
    min_channels: int | Mapping[str, int] = 1,
    protect: Sequence[str | nn.Module | nn.Parameter] = (),
    exact: bool = True,
    depth: bool = False,
    equal: Equal = "auto",
    cache: str | os.PathLike[str] | None = None,
) -> Problem:
    """The problem for an allocator with all parameters prunable and saliencies of 0, to be replaced.

    Raises:
        ValueError: as for :func:`prune_once`.
    """
    check_depth(depth, of)
    choices = round_to_choices(round_to, model, shrink=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(p) for p in parameters.values()}
    equal = check_equal(equal)
    graph = prunable_graph(model, trained, example_inputs, protect, exact, example_kwargs, depth, equal)
    floors, roles = resolve_floors(min_channels, graph), Roles.of(equal, model, graph).of_problem()
    live = graph.all_channels()

    def problem_of(multiple: int) -> Problem:
        pricing = None
        if of == "latency":
            pricing = latency.measure(
                model,
                graph,
                example_inputs,
                example_kwargs=example_kwargs,
                round_to=multiple,
                runtime=runtime,
                cache=cache,
            )
        return Problem(graph, np.zeros(len(live)), live, 0.0, of, floors, multiple, pricing=pricing, **roles)

    whole = first_feasible(choices, problem_of, keep)
    return replace(whole, budget=keep * whole.whole)


def _check_calibration(select: criteria.Criterion, given: Calibration) -> None:
    if not select.needs_gradients:
        return
    missing = None
    if not given:
        missing = "calibration: got None, expected batches to compute gradients from"
    elif given.loss is None and given.forward_loss is None:
        missing = "loss: got None, expected a function, or forward_loss for batches of any form"
    if missing is not None:
        raise ValueError(
            f"{missing}: select={select!r} ranks channels by gradients; criteria.Magnitude() ranks them "
            f"without"
        )


def _gather_rows(
    work: nn.Module,
    table: RowTable,
    activations: Activations,
    given: Calibration | None,
) -> None:
    """Fill the table from the gradients of the batches, or from the weights alone if ``given`` is None."""
    if given is None:
        sum_weight_squares(table)
        return
    for number, loss_of in enumerate(given.losses(work)):
        if number == 0 and activations.counting:
            # Thresholds of activations, like those of rows below, come from the previous pass.
            _differentiate(loss_of, number)
            work.zero_grad(set_to_none=True)
            activations.forget()
        _differentiate(loss_of, number)
        params = [view.param for view in table.views if view.param.grad is not None]
        if number == 0:
            # Thresholds come from the previous step: the first batch runs twice and counts once.
            _take(table, params)
            for array in (table.activity, table.channel_dot, table.channel_dot_sq, table.updates):
                array.zero_()
        _take(table, params)
        work.zero_grad(set_to_none=True)


def _differentiate(loss_of: Callable[[], Tensor], number: int) -> None:
    with torch.enable_grad():
        value = loss_of()
    _check_loss(value, number)
    value.backward()


@torch.no_grad()
def _take(table: RowTable, params: Sequence[Tensor]) -> None:
    """Add the statistics of one step from the gradients of ``params``."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for param in params:
        lists.setdefault(param.dtype, []).append(param)
    for same in lists.values():
        grads = [param.grad for param in same if param.grad is not None]
        step_(STATISTICS, (same, grads), StatisticsOptions(), table.rows_of(same))
    channel_moments_(table)


def _check_loss(value: object, number: int) -> None:
    problem = None
    if not isinstance(value, Tensor) or value.numel() != 1:
        problem = f"{type(value).__name__} {list(getattr(value, 'shape', []))}"
    elif not value.requires_grad:
        problem = "a value that depends on no parameter"
    elif not bool(torch.isfinite(value)):
        problem = f"{value.item()}"
    if problem is not None:
        raise ValueError(
            f"loss: got {problem} for batch {number}, expected one finite number with a gradient"
        )


def _restored(work: nn.Module, model: nn.Module) -> nn.Module:
    """Give ``work``, a copy of ``model``, the modes and ``requires_grad`` of ``model``."""
    for copied, module in zip(work.modules(), model.modules(), strict=True):
        copied.training = module.training
    for ours, theirs in zip(work.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return work


def _has_norms(model: nn.Module) -> bool:
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.track_running_stats for norm in norms)


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Restore the random generators at the end, because calibration may draw numbers (shuffling, dropout)."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
