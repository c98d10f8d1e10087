"""Counting of optimizer steps: which of them trained, and with which learning rates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from sparsekern.distributed.ranks import Ranks
from sparsekern.kernels.rows import RowTable
from sparsekern.optim.in_backward import works_in_backward
from sparsekern.prune.state.sharded import ShardedTable, changes_nothing


class SkippedSteps:
    """Counts the steps that GradScaler has skipped, without a synchronisation in any step.

    GradScaler calls an optimizer that unscales by itself (ours, torch's fused ones) in every step. That
    optimizer changes nothing if ``found_inf`` is set. GradScaler does not call other optimizers in such a
    step.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None

    def note(self, optimizer: Optimizer) -> None:
        """Count the present step if it is skipped."""
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None:
            skipped = (found.detach() != 0).long().sum()
            self._count = skipped if self._count is None else self._count + skipped

    def pending(self) -> int:
        """Number of skipped steps since :meth:`take`; synchronises if there is a GradScaler."""
        return 0 if self._count is None else int(self._count)

    def take(self, ranks: Ranks) -> int:
        """Return :meth:`pending` and reset it to 0. All processes have to call this.

        Raises:
            RuntimeError: the processes have skipped different numbers of steps.
        """
        if self._count is None:
            return 0
        count = self.pending()
        with ranks.agreeing("the steps that GradScaler has skipped") as check:
            check(count)
        self._count = None
        return count


def idle(optimizer: Optimizer, table: RowTable, ranks: Ranks) -> bool:
    """Whether a step has changed nothing, as far as this is known without a synchronisation.

    Such a step has no gradient at all. Or ``torch.distributed.checkpoint`` makes it to create an optimizer's
    state, with a learning rate of 0 and gradients of 0. Processes with different rates agree on the result:
    gradients are averaged before the step. Of sharded gradients each process knows only its part, so the sums
    that follow every step include the parts of the others. No process waits here for one that has not made
    this step.
    """
    if changes_nothing(optimizer):
        return not table.trained() if isinstance(table, ShardedTable) else True
    # The first gradient ends the search. Other processes may have gradients that this one lacks.
    given = (param.grad is not None for group in optimizer.param_groups for param in group["params"])
    return ranks.size == 1 and not works_in_backward(optimizer) and not any(given)


class Rates:
    """The learning rates of the steps since the latest decision, to be compared between processes."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, tuple[float | None, ...]]] = []

    def note(self, step: int, optimizer: Optimizer) -> None:
        """Add the rates of step ``step`` if they differ from the previous ones; None for a rate on a GPU."""
        rates = tuple(_number(group.get("lr")) for group in optimizer.param_groups)
        if not self._seen or self._seen[-1][1] != rates:
            self._seen.append((step, rates))

    def forget(self) -> None:
        """Drop all rates but the latest."""
        self._seen = self._seen[-1:]

    def parts(self) -> list[tuple[int, tuple[float | None, ...]]]:
        """All rates, as pairs of a step and the rates from that step on."""
        return list(self._seen)


def differing_rates(every: Sequence[list[tuple[int, tuple[float | None, ...]]]]) -> str:
    """The first difference between the :meth:`Rates.parts` of all processes, as text; empty if none."""
    for step in sorted({step for parts in every for step, _ in parts}):
        now = [next((rates for at, rates in reversed(parts) if at <= step), ()) for parts in every]
        if len(set(now)) > 1:
            named = ", ".join(f"rank {rank} has {list(rates)}" for rank, rates in enumerate(now))
            return f"learning rates at step {step}: {named}"
    return ""


def _number(rate: object) -> float | None:
    if isinstance(rate, Tensor):
        return float(rate) if rate.device.type == "cpu" else None
    return float(rate) if isinstance(rate, (int, float)) else None
