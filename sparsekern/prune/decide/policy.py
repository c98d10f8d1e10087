"""Which channels go at an event, and which feel a penalty until the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsekern.prune.decide.allocate import Allocator, Problem
from sparsekern.prune.decide.budget import check_feasible, first_feasible
from sparsekern.prune.decide.criteria import Criterion, Partners, saliency
from sparsekern.prune.schedule import Event
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.network import Network
from sparsekern.prune.state.statistics import Statistics, gather


@dataclass(frozen=True, eq=False)
class Choice:
    """What happens at one event, with channels as bool arrays ``[C]``.

    Attributes:
        condemned: channels that go.
        partners: what they may be folded into.
        penalised: channels whose gates get the extra decay ``penalty``.
    """

    event: Event
    condemned: np.ndarray
    partners: Partners | None
    penalised: np.ndarray
    penalty: float

    def parts(self) -> tuple[Any, ...]:
        """All that the network's further way depends on, to be compared between processes."""
        folds: tuple[Any, ...] = ()
        if self.partners is not None:
            folds = self.partners.channel[self.condemned], self.partners.coefficient[self.condemned]
        return self.condemned, self.penalised, self.penalty, *folds

    def carry_out(self, masks: Masks, undo: ExitStack | None = None) -> None:
        """Fold, condemn and penalise; ``undo`` is told what restores the weights."""
        condemned = self.condemned
        if self.partners is not None:
            folded = masks.fold(condemned, self.partners, undo)
            masks.mask(folded, undo)
            condemned = condemned & ~folded
        masks.condemn(condemned, self.event.decline)
        masks.penalise(self.penalised, self.penalty)


@dataclass(frozen=True, eq=False)
class Policy:
    """What decisions follow from, beside the statistics; see the arguments of a Pruner.

    Attributes:
        floors: int64 ``[groups]``; channels that stay at least.
    """

    select: Criterion
    allocate: Allocator
    of: str
    floors: np.ndarray
    round_to: int
    penalty: float

    def problem(
        self, network: Network, saliency: np.ndarray, live: np.ndarray, share: float, of: str | None = None
    ) -> Problem:
        """Bring the network down to ``share`` of what it cost whole, among the channels ``live``."""
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
        )

    def rounded(
        self, network: Network, choices: Sequence[int], keep: float, time: Callable[[int], None]
    ) -> Policy:
        """The same with the first of ``choices`` for ``round_to`` that ``keep`` can be met with.

        ``time`` finds the latency of the network for one of them, where that is the cost.

        Raises:
            ValueError: there is none, see :func:`sparsekern.prune.decide.budget.check_feasible`.
        """
        everything = np.ones(network.graph.num_channels, bool)

        def problem_of(multiple: int) -> Problem:
            if self.of == "latency":
                time(multiple)
            own = replace(self, round_to=multiple)
            return own.problem(network, np.zeros(len(everything)), everything, keep)

        return replace(self, round_to=first_feasible(choices, problem_of, keep).round_to)

    def widths(self, network: Network, share: float, of: str | None = None) -> np.ndarray:
        """The channels (bool ``[C]``) that would stay if the budget were ``share`` from now on.

        Raises:
            ValueError: floors and frozen layers do not allow that.
        """
        live = network.masks.unmasked
        statistics = gather(network.rows, network.graph, live, network.parameters, network.activations)
        problem = self.problem(network, self.saliency(statistics), statistics.live, share, of)
        check_feasible(problem, share)
        return self.allocate(problem)

    def choose(self, network: Network, event: Event, following: Event | None) -> Choice:
        """The least salient channels that have to go, and the next in line. Changes nothing."""
        live = network.masks.live
        statistics = gather(network.rows, network.graph, live, network.parameters, network.activations)
        saliency = self.saliency(statistics)
        kept = self.allocate(self.problem(network, saliency, live, event.share))
        partners = self.select.partners(statistics, saliency)
        penalised, penalty = self._next_in_line(network, event, following, saliency, kept)
        return Choice(event, live & ~kept, partners, penalised, penalty)

    def _next_in_line(
        self, network: Network, event: Event, following: Event | None, saliency: np.ndarray, kept: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The channels that would go at the next event, and the extra decay for their gates until then."""
        if not self.penalty or following is None:
            return np.zeros_like(kept), 0.0
        then = self.allocate(self.problem(network, saliency, kept, following.share))
        group = _group_of(network)
        momentum = float(group.get("momentum", 0.0))
        # A step takes off lr * penalty, and a momentum buffer repeats that 1 / (1 - momentum) times.
        rate = float(group.get("lr", 1.0)) * event.decline / (1 - momentum)
        return kept & ~then, self.penalty / rate if rate > 0 else 0.0

    def saliency(self, statistics: Statistics) -> np.ndarray:
        """What ``select`` gives, float64 ``[C]``.

        Raises:
            ValueError: it gives something else.
        """
        return saliency(self.select, statistics)


def _group_of(network: Network) -> dict[str, Any]:
    """The first group of the optimizer with rows of this network; others may train other models."""
    groups: list[dict[str, Any]] = network.optimizer.param_groups
    index = network.rows.table.index
    return next((g for g in groups if any(id(param) in index for param in g["params"])), groups[0])
