"""Which optimizer steps count for a schedule."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from sparsekern._sharding import local
from sparsekern.optim.in_backward import works_in_backward
from sparsekern.prune.ranks import Ranks


class SkippedSteps:
    """Counts the steps that GradScaler has skipped, without a synchronisation in any of them.

    An optimizer that unscales by itself (ours, torch's fused ones) is called by GradScaler in every step, and
    leaves everything as it is where ``found_inf`` is set. Others are not called at all in such a step.
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None

    def note(self, optimizer: Optimizer) -> None:
        """Add the step that is under way, if it is skipped."""
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if found is not None:
            skipped = (found.detach() != 0).long().sum()
            self._count = skipped if self._count is None else self._count + skipped

    def pending(self) -> int:
        """How many there were since :meth:`take`; synchronises where there is a GradScaler."""
        return 0 if self._count is None else int(self._count)

    def take(self, ranks: Ranks) -> int:
        """The same, and starts anew. All processes have to call this.

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


def idle(optimizer: Optimizer, ranks: Ranks) -> bool:
    """Whether a step has changed nothing, as far as that can be told without a synchronisation.

    That is a step without any gradient, or the one by which ``torch.distributed.checkpoint`` makes an
    optimizer's state: with a learning rate of 0 and gradients of 0.
    """
    groups = optimizer.param_groups
    rates = [group.get("lr") for group in groups]
    # A rate on a device is not read: that of the checkpoint's step is not there.
    zero = not any((isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0 for rate in rates)
    if not zero:
        # The first gradient ends the search. Other processes may have some where this one has none.
        given = (param.grad is not None for group in groups for param in group["params"])
        return ranks.size == 1 and not works_in_backward(optimizer) and not any(given)
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    return not ranks.any(any(bool(local(grad).any()) for grad in grads))
