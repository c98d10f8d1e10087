"""The choice at an event: the channels that go under its budget, and those that are penalised until the next.

The budget is in MACs, parameters or, with the latency model of the network, nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sparsekern.prune.decide.allocate import Allocator, Problem
from sparsekern.prune.decide.budget import (
    Unit,
    check_depth,
    check_feasible,
    check_keep,
    check_penalty,
    check_unit,
    first_feasible,
    resolve_floors,
)
from sparsekern.prune.decide.criteria import Criterion, Partners, check_counted, saliency
from sparsekern.prune.decide.names import resolve_allocate, resolve_select
from sparsekern.prune.decide.roles import Equal, Roles, check_equal
from sparsekern.prune.schedule import Event, Schedule
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.network import Network
from sparsekern.prune.state.statistics import Statistics, gather
from sparsekern.runtimes import Runtime


@dataclass(frozen=True, eq=False)
class Choice:
    """The decision of one event, with channels as bool arrays ``[C]``.

    Attributes:
        event: the event.
        fading: channels that go.
        partners: the channels that they may be folded into; None for no folding.
        penalised: channels whose gates get the extra decay ``penalty``.
        penalty: weight decay, as in the optimizer's ``weight_decay``.
    """

    event: Event
    fading: np.ndarray
    partners: Partners | None
    penalised: np.ndarray
    penalty: float

    def parts(self) -> tuple[Any, ...]:
        """The values that determine the network from now on, to be compared between processes."""
        folds: tuple[Any, ...] = ()
        if self.partners is not None:
            folds = self.partners.channel[self.fading], self.partners.coefficient[self.fading]
        return self.fading, self.penalised, self.penalty, *folds

    def carry_out(self, masks: Masks, undo: ExitStack | None = None) -> None:
        """Fold, fade out and penalise channels; ``undo`` receives callbacks that restore the weights."""
        fading = self.fading
        if self.partners is not None:
            folded = masks.fold(fading, self.partners, undo)
            masks.mask(folded, undo)
            fading = fading & ~folded
        masks.fade_out(fading, self.event.fade_steps)
        masks.penalise(self.penalised, self.penalty)


@dataclass(frozen=True, eq=False)
class Policy:
    """The rules that determine decisions, besides the statistics; see the arguments of a Pruner.

    Attributes:
        select: gives every channel its saliency.
        allocate: sets the widths of the groups.
        of: the cost that the budget limits.
        penalty: extra decay of the gates of the next channels to go.
        floors: int64 ``[groups]``; channels that every group keeps at least. Empty before :meth:`fitted`.
        round_to: the multiple of group widths. 1 before :meth:`fitted`.
        runtime: where latencies are measured.
        depth: whether residual blocks can be removed as a whole.
        equal: the argument of a Pruner.
        roles: the groups that keep the same width; None before :meth:`fitted`.
    """

    select: Criterion
    allocate: Allocator
    of: Unit
    penalty: float
    floors: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    round_to: int = 1
    runtime: Runtime = "torch"
    depth: bool = False
    equal: Equal = None
    roles: Roles | None = None

    @classmethod
    def from_arguments(
        cls,
        select: object,
        allocate: object,
        of: object,
        penalty: object,
        runtime: Runtime,
        depth: object = False,
        equal: object = None,
    ) -> Policy:
        """The policy of these arguments of a Pruner, before the network is known.

        Raises:
            ValueError: an argument is not valid.
        """
        of = check_unit(of, runtime)
        select, allocate = resolve_select(select), resolve_allocate(allocate)
        depth, equal = check_depth(depth, of), check_equal(equal)
        return cls(select, allocate, of, check_penalty(penalty), runtime=runtime, depth=depth, equal=equal)

    @property
    def counts(self) -> bool:
        """Whether fused normalisations have to count gradients."""
        return self.select.needs_activations

    def problem(
        self, network: Network, saliency: np.ndarray, live: np.ndarray, share: float, of: str | None = None
    ) -> Problem:
        """The problem of reducing the cost to ``share`` of the dense one, among the channels ``live``.

        The budget is ``share`` of the cost before any cut: of MACs, of parameters, or, for latency, of the
        nanoseconds that the latency model of the network gives.
        """
        of = of or self.of
        pricing, whole = network.priced(of)
        return Problem(
            network.graph,
            saliency,
            live,
            share * whole,
            of,
            self.floors,
            self.round_to,
            whole,
            network.widths,
            pricing,
            **({} if self.roles is None else self.roles.of_problem()),
        )

    def fitted(
        self,
        network: Network,
        keep: float,
        min_channels: int | Mapping[str, int],
        choices: Sequence[int],
        time: Callable[[int], None],
    ) -> Policy:
        """The same policy with the floors, the roles and the ``round_to`` for a network.

        Args:
            network: the network at full size.
            keep: the share of the cost that the policy has to be able to reach.
            min_channels: as for :class:`sparsekern.Pruner`.
            choices: numbers for ``round_to``; the first one that can meet ``keep`` is used.
            time: measures the latency of the network for one of ``choices``; called if the cost is latency.

        Raises:
            ValueError: ``min_channels`` or ``equal`` is not valid, ``select`` needs counts of activations
                that no module makes, or no choice can meet ``keep``
                (:func:`sparsekern.prune.decide.budget.check_feasible`).
        """
        floors = resolve_floors(min_channels, network.graph)
        roles = Roles.of(self.equal, network.model, network.graph)
        check_counted(self.select, network.activations)
        everything = network.graph.all_channels()

        def problem_of(multiple: int) -> Problem:
            if self.of == "latency":
                time(multiple)
            own = replace(self, floors=floors, round_to=multiple, roles=roles)
            return own.problem(network, np.zeros(len(everything)), everything, keep)

        multiple = first_feasible(choices, problem_of, keep).round_to
        return replace(self, floors=floors, round_to=multiple, roles=roles)

    def widths(self, network: Network, keep: object, of: object = None) -> np.ndarray:
        """The channels (bool ``[C]``) that would stay if the budget were ``keep`` from now on.

        Args:
            network: the network.
            keep: share of the dense cost, in (0, 1].
            of: the cost; None for that of the policy.

        Raises:
            ValueError: ``keep`` or ``of`` is not valid, or floors and frozen layers do not allow ``keep``.
        """
        of = None if of is None else check_unit(of)
        if keep is None:
            raise ValueError(f"keep: got None with of={of!r}, expected the share of that cost that stays")
        share = check_keep(keep)
        network.rows.table.settle()
        live = network.masks.unmasked
        statistics = gather(network.rows, network.graph, live, network.parameters, network.activations)
        problem = self.problem(network, self.saliency(statistics), statistics.live, share, of)
        check_feasible(problem, share)
        return problem.checked(self.allocate(problem))

    def choose(self, network: Network, event: Event, schedule: Schedule) -> Choice:
        """Choose the channels that go and the next ones, which are penalised. Changes nothing.

        Args:
            network: the network.
            event: the event.
            schedule: its schedule, with the budgets of the events that follow.

        Raises:
            ValueError: see :meth:`saliency` and :meth:`Problem.checked`.
        """
        live = network.masks.live
        statistics = gather(network.rows, network.graph, live, network.parameters, network.activations)
        saliency = self.saliency(statistics)
        kept = self._allocated(network, saliency, live, event, schedule)
        partners = self.select.partners(statistics, saliency)
        penalised, penalty = self._next_in_line(network, event, schedule, saliency, kept)
        return Choice(event, live & ~kept, partners, penalised, penalty)

    def _allocated(
        self, network: Network, saliency: np.ndarray, live: np.ndarray, event: Event, schedule: Schedule
    ) -> np.ndarray:
        """The channels that stay under the budget of an event, bool ``[C]``.

        A large step, such as a head of every layer, may exceed the budget of an event by far. At an event
        before the last one, only channels go that the last budget does not leave room for either.
        """
        problem = self.problem(network, saliency, live, event.share)
        last = schedule.events[-1].share
        if event.share > last and problem.coarse.any():
            least = self.allocate(self.problem(network, saliency, live, last))
            widths = np.bincount(network.graph.group_of[least], minlength=len(problem.floors))
            problem = replace(problem, floors=np.maximum(problem.floors, widths))
        return problem.checked(self.allocate(problem))

    def _next_in_line(
        self, network: Network, event: Event, schedule: Schedule, saliency: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The channels that would go at the next event, and the extra weight decay of their gates."""
        following = schedule.after(event.step)
        if not self.penalty or following is None:
            return np.zeros_like(kept), 0.0
        then = self._allocated(network, saliency, kept, following, schedule)
        group = _group_of(network)
        momentum = float(group.get("momentum", 0.0))
        # A step subtracts lr * penalty, and a momentum buffer repeats that 1 / (1 - momentum) times.
        rate = float(group.get("lr", 1.0)) * event.fade_steps / (1 - momentum)
        return kept & ~then, self.penalty / rate if rate > 0 else 0.0

    def saliency(self, statistics: Statistics) -> np.ndarray:
        """The saliencies that ``select`` gives, float64 ``[C]``.

        Raises:
            ValueError: ``select`` gives another shape or values that are not finite.
        """
        return saliency(self.select, statistics)


def _group_of(network: Network) -> dict[str, Any]:
    """The first group of the optimizer with rows of this network; other groups may train other models."""
    groups: list[dict[str, Any]] = network.optimizer.param_groups
    index = network.rows.table.index
    return next((g for g in groups if any(id(param) in index for param in g["params"])), groups[0])
