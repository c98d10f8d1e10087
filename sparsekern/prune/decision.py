"""Which channels go at an event, and which feel a penalty until the next one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsekern.prune.allocate import Allocator, Problem
from sparsekern.prune.criteria import Criterion
from sparsekern.prune.network import Network
from sparsekern.prune.schedule import Event
from sparsekern.prune.statistics import Statistics, gather


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

    def problem(self, network: Network, saliency: np.ndarray, live: np.ndarray, share: float) -> Problem:
        """Bring the network down to ``share`` of what it cost whole, among the channels ``live``."""
        whole = int(getattr(network.whole, self.of))
        return Problem(
            network.graph,
            saliency,
            live,
            share * whole,
            self.of,
            self.floors,
            self.round_to,
            whole,
            network.widths,
        )

    def condemn(self, network: Network, event: Event, following: Event | None) -> None:
        """Let the least salient channels go until the budget is met, and weigh on the next in line."""
        masks, live = network.masks, network.masks.live
        statistics = gather(network.rows, network.graph, live, network.parameters)
        saliency = self.saliency(statistics)
        kept = self.allocate(self.problem(network, saliency, live, event.share))
        condemned = live & ~kept
        partners = self.select.partners(statistics, saliency)
        if partners is not None:
            folded = masks.fold(condemned, partners)
            masks.mask(folded)
            condemned &= ~folded
        masks.condemn(condemned, event.decline)
        self._penalise(network, event, following, saliency, kept)

    def _penalise(
        self, network: Network, event: Event, following: Event | None, saliency: np.ndarray, kept: np.ndarray
    ) -> None:
        """Extra decay for the gates of those channels that would go at the next event."""
        if not self.penalty or following is None:
            network.masks.penalise(np.zeros_like(kept), 0.0)
            return
        then = self.allocate(self.problem(network, saliency, kept, following.share))
        group = network.optimizer.param_groups[0]
        momentum = float(group.get("momentum", 0.0))
        # A step takes off lr * penalty, and a momentum buffer repeats that 1 / (1 - momentum) times.
        rate = float(group["lr"]) * event.decline / (1 - momentum)
        network.masks.penalise(kept & ~then, self.penalty / rate if rate > 0 else 0.0)

    def saliency(self, statistics: Statistics) -> np.ndarray:
        """What ``select`` gives, float64 ``[C]``.

        Raises:
            ValueError: it gives something else.
        """
        saliency = np.asarray(self.select(statistics), np.float64)
        channels = statistics.graph.num_channels
        if saliency.shape != (channels,) or not np.isfinite(saliency).all():
            raise ValueError(
                f"select: {self.select!r} gave an array of shape {saliency.shape} with "
                f"{int((~np.isfinite(saliency)).sum())} non-finite values, expected [{channels}] finite ones"
            )
        return saliency
