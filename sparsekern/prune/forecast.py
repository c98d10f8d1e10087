"""The cost of a training, estimated before it begins."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from torch import nn

from sparsekern.compact import Plan
from sparsekern.compact.plan import make_plan
from sparsekern.compact.transaction import all_or_nothing
from sparsekern.graph.cost import Cost
from sparsekern.prune.calibration import ForwardLoss
from sparsekern.prune.decide.allocate import Uniform
from sparsekern.prune.decide.policy import Policy
from sparsekern.prune.decide.settings import Settings
from sparsekern.prune.run.events import Events
from sparsekern.prune.schedule import Schedule
from sparsekern.prune.state.network import Network
from sparsekern.prune.trial_steps import Loss, Trial, loss_to_time, state_bytes, time_steps, trying

# Number of network sizes at which steps are timed; times of other sizes are interpolated.
_POINTS = 4
# Steps that gather statistics for the trial decisions. There is no threshold before the second step.
_STEPS = 4


@dataclass(frozen=True)
class Stage:
    """The network between two events.

    Attributes:
        start, stop: first step of the stage (counted from 0) and first step after it.
        macs: multiply-adds of one forward pass on the example inputs.
        params: number of elements of all parameters.
        weight_bytes: bytes of parameters, gradients and the optimizer's state; the sum over all ranks if they
            are sharded.
        activation_bytes: bytes of all tensors that a forward pass on the example inputs makes.
        allreduce_bytes: bytes that each rank sends per step to average the gradients in a ring.
        seconds: time of one training step, None if it was not measured.
    """

    start: int
    stop: int
    macs: int
    params: int
    weight_bytes: int
    activation_bytes: int
    allreduce_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """The stages of a training, the dense one first; ``print`` shows them as a table.

    Attributes:
        stages: the stages in order.
        ranks: number of processes that average their gradients.
        macs_share: multiply-adds of the whole training over those of a dense one.
        seconds, dense_seconds: time of the whole training and of a dense one, None if steps were not
            measured. Neither includes work between steps, such as evaluations and checkpoints.
        pruner_seconds: the part of ``seconds`` that the construction of the Pruner and its events take.
        time_share: ``seconds`` over ``dense_seconds``.
    """

    stages: tuple[Stage, ...]
    ranks: int
    macs_share: float
    seconds: float | None
    dense_seconds: float | None
    pruner_seconds: float | None

    @property
    def time_share(self) -> float | None:
        if self.seconds is None or self.dense_seconds is None:
            return None
        return self.seconds / self.dense_seconds

    def __str__(self) -> str:
        head = ["steps", "MACs", "", "parameters", "", "weights, grads, state", "activations"]
        rows = [[*_size_cells(stage, self.stages[0])] for stage in self.stages]
        if self.ranks > 1:
            head.append("all-reduced")
            rows = [[*row, _mib(s.allreduce_bytes)] for row, s in zip(rows, self.stages, strict=True)]
        if self.seconds is not None:
            head.append("ms a step")
            rows = [[*row, f"{1e3 * (s.seconds or 0):.1f}"] for row, s in zip(rows, self.stages, strict=True)]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        lines.append(f"the whole training: {self.macs_share:.1%} of the multiply-adds of a dense one")
        if self.seconds is not None and self.dense_seconds is not None:
            lines[-1] += (
                f", {self.time_share:.1%} of its time ({self.seconds:.0f} s, {self.pruner_seconds:.1f} of "
                f"them for the Pruner and its events, of {self.dense_seconds:.0f})"
            )
        if self.ranks > 1:
            lines.append(f"all-reduced: sent by each of {self.ranks} ranks in every step")
        return "\n".join(lines)


class Forecaster:
    """Computes forecasts of a training that has not begun.

    Args:
        network: the network at full size.
        settings: the settings of the Pruner.
        events: the progress of the training, with its schedule.
        example: positional and keyword arguments of a forward pass.
        begin: ``time.perf_counter()`` when the construction of the Pruner began; it ends here.
    """

    def __init__(
        self,
        network: Network,
        settings: Settings,
        events: Events,
        example: tuple[tuple[Any, ...], Mapping[str, Any]],
        begin: float,
    ) -> None:
        self._network, self._settings, self._events, self._example = network, settings, events, example
        self._setup_seconds = perf_counter() - begin

    def forecast(self, ranks: int, measure: Any, forward_loss: ForwardLoss | None) -> Forecast:
        """See :meth:`sparsekern.Pruner.forecast`.

        Args:
            ranks: processes that average their gradients.
            measure: False assumes that all layers keep an equal share, within floors and ``round_to``. Else a
                copy decides by gradients of its first steps, and they are timed: on the example inputs (True)
                or others, with the mean square of the outputs as the loss, or by a function that takes the
                copy and returns the loss on a batch.
            forward_loss: ``forward_loss(model, batch)`` returns the loss of a copy on the batch ``measure``.

        Raises:
            TypeError: ``forward_loss`` is not a function.
            ValueError: ``ranks`` is not a whole number >= 1, a step on these inputs fails, or
                ``forward_loss`` comes without a batch.
            RuntimeError: channels have already been cut out of the model.
        """
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise ValueError(f"ranks: got {ranks!r}, expected a whole number >= 1")
        now, whole = self._network.graph.num_channels, self._network.rows.total
        if now != whole:
            raise RuntimeError(
                f"forecast: got a model that has been cut to {now} of {whole} channels, expected one of full "
                f"size; call it before the training begins"
            )
        loss = loss_to_time(measure, forward_loss, self._example, self._network.model)
        schedule = self._events.schedule
        return _estimate(self._network, self._settings, schedule, ranks, loss, self._setup_seconds)


def _estimate(
    network: Network,
    settings: Settings,
    schedule: Schedule,
    ranks: int,
    loss: Loss | None,
    setup_seconds: float,
) -> Forecast:
    """The forecast, with times of training steps if their ``loss`` is given."""
    policy, steps = settings.policy, settings.timing.steps
    events = schedule.events if settings.shrink else ()
    starts = [0, *(event.step + event.fade_steps for event in events)]
    pruner_seconds = None
    if loss is None:
        sizes = _evenly(network, policy, [event.share for event in events])
    else:
        sizes, deciding = _fast_forward(network, policy, schedule if settings.shrink else None, loss)
        pruner_seconds = setup_seconds + deciding
    costs = [cost for _, cost in sizes]
    seconds = None if loss is None else _seconds(network, sizes, loss)
    own, state = _parameter_bytes(network.model), state_bytes(network.optimizer)
    stages = []
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], steps], strict=True)):
        cost = costs[number]
        part = cost.params / max(network.whole.params, 1)
        stages.append(
            Stage(
                start,
                stop,
                cost.macs,
                cost.params,
                round(part * (2 * own + state)),
                cost.activations,
                # In a ring each rank sends all but its own share of the gradients twice: to add and to
                # distribute.
                round(2 * (ranks - 1) / ranks * part * own),
                None if seconds is None else seconds[number],
            )
        )
    total = sum((stage.stop - stage.start) * stage.macs for stage in stages)
    timed = dense = None
    if seconds is not None:
        timed = sum((s.stop - s.start) * (s.seconds or 0) for s in stages) + (pruner_seconds or 0)
        dense = steps * seconds[0]
    macs_share = total / (steps * max(network.whole.macs, 1))
    return Forecast(tuple(stages), ranks, macs_share, timed, dense, pruner_seconds)


def _evenly(network: Network, policy: Policy, shares: Sequence[float]) -> list[tuple[Plan, Cost]]:
    """Plan and cost of every stage, the dense one first, if every layer keeps an equal share of its width."""
    graph, everything = network.graph, network.graph.all_channels()
    sizes = []
    for share in (1.0, *shares):
        kept = Uniform()(policy.problem(network, np.zeros(len(everything)), everything, share))
        sizes.append((make_plan(graph, kept), graph.cost(kept)))
    return sizes


def _fast_forward(
    network: Network, policy: Policy, schedule: Schedule | None, loss: Loss
) -> tuple[list[tuple[Plan, Cost]], float]:
    """Plan and cost of every stage, the dense one first, from the decisions of all events in sequence.

    The decisions use the gradients of a few steps of the dense network and are carried out on a copy. The
    time of a step depends more on the widths of single layers than on the MACs: early layers have few MACs
    for the activations that they move. Even the first gradients predict the widths better than an even cut.

    Returns:
        For each stage the plan and its cost, and the seconds that the events took.
    """
    trial = Trial(network.model, network.optimizer, Plan({}), loss)
    own = network.for_copy(trial.model, trial.optimizer)
    sizes = [_size(own)]
    if schedule is None:
        return sizes, 0.0
    own.attach()
    with trying(network.model):
        for _ in range(_STEPS):
            trial.step()
        begin = perf_counter()
        for event in schedule.events:
            choice = policy.choose(own, event, schedule)
            choice.carry_out(own.masks)
            own.masks.mask(~own.masks.live & own.masks.unmasked)
            with all_or_nothing() as undo:
                own.shrink(undo)
            sizes.append(_size(own))
    return sizes, perf_counter() - begin


def _size(network: Network) -> tuple[Plan, Cost]:
    everything = network.graph.all_channels()
    return network.plan(everything), network.graph.cost(everything)


def _seconds(network: Network, sizes: Sequence[tuple[Plan, Cost]], loss: Loss) -> list[float]:
    """Seconds of a training step of the network of every stage."""
    macs = [cost.macs for _, cost in sizes]
    chosen = sorted({round(i) for i in np.linspace(0, len(sizes) - 1, _POINTS)})
    rounds = time_steps(network.model, network.optimizer, [sizes[index][0] for index in chosen], loss)
    measured = [statistics.median(times) for times in rounds]
    order = np.argsort([macs[index] for index in chosen])
    found = np.interp(macs, np.array([macs[index] for index in chosen])[order], np.array(measured)[order])
    return [float(value) for value in found]


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _size_cells(stage: Stage, dense: Stage) -> list[str]:
    return [
        f"{stage.start}-{stage.stop - 1}",
        f"{stage.macs:,}",
        f"{stage.macs / max(dense.macs, 1):.1%}",
        f"{stage.params:,}",
        f"{stage.params / max(dense.params, 1):.1%}",
        _mib(stage.weight_bytes),
        _mib(stage.activation_bytes),
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
