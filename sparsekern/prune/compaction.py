"""Plans of what stays of a network in training, and its compact copy."""

from __future__ import annotations

from torch import nn

from sparsekern.compact import Plan, compact, make_plan
from sparsekern.distributed.ranks import Ranks
from sparsekern.prune.decide.budget import Unit
from sparsekern.prune.decide.settings import Settings
from sparsekern.prune.run.budget_warning import BudgetWarning
from sparsekern.prune.run.events import Events
from sparsekern.prune.state.network import Network


class Compaction:
    """Plans and compacts the network as it is now.

    Args:
        settings: the budget and the steps of the whole training.
        network: the network and its masks.
        events: the progress of the training.
        ranks: the processes of the training.
    """

    def __init__(self, settings: Settings, network: Network, events: Events, ranks: Ranks) -> None:
        self._settings, self._network, self._ranks = settings, network, ranks
        self._warning = BudgetWarning(settings, network, events)

    def plan(self, keep: float | None, of: Unit | None) -> Plan:
        """See :meth:`sparsekern.Pruner.plan`."""
        self._network.check_masked()
        if keep is not None or of is not None:
            return self._network.plan(self._settings.policy.widths(self._network, keep, of))
        self._warning.warn()
        return self._network.plan(self._network.masks.unmasked)

    def compact(self) -> nn.Module:
        """See :meth:`sparsekern.Pruner.compact`."""
        network = self._network
        network.check_masked(self._ranks if network.sharded else None)
        self._warning.warn()
        return compact(network.model, make_plan(network.graph, network.masks.unmasked))
