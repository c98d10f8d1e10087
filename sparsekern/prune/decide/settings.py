"""The settings of a Pruner that a resumed training must have in common with the saved one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsekern.distributed.ranks import Ranks
from sparsekern.prune.decide.policy import Policy
from sparsekern.prune.schedule import Timing


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of a Pruner after their checks, with names replaced by objects.

    Attributes:
        keep: share of the dense cost that stays, in (0, 1].
        policy: the rules by which channels are chosen.
        timing: the steps at which channels are chosen.
        shrink: whether every event cuts masked channels out of the live model.
    """

    keep: float
    policy: Policy
    timing: Timing
    shrink: bool

    def agree(self, ranks: Ranks, channels: Sequence[str], nonfinite: str) -> None:
        """Check that all processes have the same settings.

        Args:
            ranks: the processes.
            channels: the fingerprint of the network's channels.
            nonfinite: the response to gradients that are not finite.

        Raises:
            RuntimeError: they differ.
        """
        with ranks.agreeing("the Pruner's arguments and the channels of its model") as check:
            check(self.to_plain(), channels, nonfinite)

    def to_plain(self) -> dict[str, Any]:
        """The settings as plain values, for a state."""
        policy = self.policy
        return {
            "keep": self.keep,
            "of": policy.of,
            "runtime": policy.runtime,
            **asdict(self.timing),
            "select": repr(policy.select),
            "allocate": repr(policy.allocate),
            "round_to": policy.round_to,
            "floors": policy.floors.tolist(),
            "equal": None if policy.roles is None else policy.roles.setting,
            "penalty": policy.penalty,
            "shrink": self.shrink,
            "depth": policy.depth,
        }
