"""Shrinking under ``fully_shard``: a smaller model takes the place of the present one in all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from sparsekern.compact.reshard import Shard, check_fully_sharded
from sparsekern.compact.transaction import uninterrupted
from sparsekern.distributed.ranks import Ranks
from sparsekern.prune.save.saved_state import SavedState
from sparsekern.prune.state.network import Network


class Resharding:
    """Rebuilds a sharded model at its present number of channels.

    Args:
        model: the model as the user has it, possibly inside ``torch.compile``.
        optimizer: the optimizer as the user has it, possibly wrapped.
        network: the model, its optimizer and the states of its channels.
        ranks: the processes of the training.
        saved: loads a Pruner's state.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, network: Network, ranks: Ranks, saved: SavedState
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._network, self._ranks, self._saved = network, ranks, saved

    def reshard(self, shard: Shard, state: Mapping[str, Any] | None) -> tuple[nn.Module, Any]:
        """See :meth:`sparsekern.Pruner.reshard`."""
        network, ranks = self._network, self._ranks
        check_fully_sharded(network.model)
        if not callable(shard):
            raise TypeError(f"shard: got {type(shard).__name__}, expected a function that shards a model")
        if state is None and network.masks.unmasked.all():
            # All processes have the same masks, so none of them goes on.
            return self._model, self._optimizer
        with uninterrupted(insisting=True):
            with ranks.agreeing("making the smaller model") as check:
                kept = self._kept(state)
                smaller = None if kept.all() else network.smaller(kept)
                check(kept, state is None)
            if smaller is not None:
                with ranks.agreeing("sharding the smaller model") as check:
                    given = smaller.shard(shard)
                    check(smaller.division())
                with uninterrupted():
                    network.go_on_with(smaller, kept)
                self._model = given
            if state is not None:
                self._saved.load(state, ())
        return self._model, self._optimizer

    def _kept(self, state: Mapping[str, Any] | None) -> np.ndarray:
        """The channels (bool ``[C]``) of the smaller model: those not masked, or those of ``state``.

        Raises:
            ValueError: the state does not fit.
            RuntimeError: masked rows are not zero, or a parameter was replaced.
        """
        self._network.rows.table.settle()
        if state is not None:
            return self._saved.check(state)
        self._network.check_masked()
        return self._network.masks.unmasked
