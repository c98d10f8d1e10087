"""Optimizers that process a row table in their step, and hooks that do so around any other optimizer."""

from __future__ import annotations

from torch.optim import Optimizer

from sparsekern.kernels.rows import RowTable
from sparsekern.optim.adam import Adam as Adam
from sparsekern.optim.adam import AdamW as AdamW
from sparsekern.optim.attachment import Attachment as Attachment
from sparsekern.optim.base import RowOptimizer
from sparsekern.optim.hooks import RowHooks as RowHooks
from sparsekern.optim.hooks import attach_hooks
from sparsekern.optim.in_backward import InBackward as InBackward
from sparsekern.optim.in_backward import UsedGradient as UsedGradient
from sparsekern.optim.in_backward import in_backward as in_backward
from sparsekern.optim.lists import state_tensors as state_tensors
from sparsekern.optim.sgd import SGD as SGD
from sparsekern.optim.unwrap import Unwrapped as Unwrapped
from sparsekern.optim.unwrap import unwrap_optimizer as unwrap_optimizer


def attach(optimizer: Optimizer, table: RowTable) -> Attachment | RowHooks:
    """Process ``table`` in every following step of ``optimizer``.

    An optimizer of this package does so in the step itself (:meth:`RowOptimizer.attach`); any other
    optimizer gets hooks (:func:`~sparsekern.optim.hooks.attach_hooks`).

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.
        table: rows of its parameters.

    Returns:
        A handle whose ``remove()`` detaches the table.

    Raises:
        TypeError: ``optimizer`` is not a :class:`torch.optim.Optimizer`.
        ValueError: none of the table's parameters is in the optimizer.
        RuntimeError: a table with one of these parameters is attached already.
    """
    if isinstance(optimizer, RowOptimizer):
        return optimizer.attach(table)
    return attach_hooks(optimizer, table)


__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "InBackward",
    "UsedGradient",
    "in_backward",
    "unwrap_optimizer",
]


def __dir__() -> list[str]:
    return __all__
