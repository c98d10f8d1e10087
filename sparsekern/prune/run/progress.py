"""The state of a pruning, as numbers and as a line of text."""

from __future__ import annotations

from collections import Counter

from sparsekern.prune.decide.settings import Settings
from sparsekern.prune.run.events import Events
from sparsekern.prune.state.masking import FADING
from sparsekern.prune.state.network import Network


def metrics(network: Network, events: Events) -> dict[str, int | float]:
    """The state of the pruning for loggers: a flat dict of numbers.

    ``step``: optimizer steps so far; ``macs``, ``params``: cost without the masked channels; ``macs_share``,
    ``params_share``: the same as shares of the dense cost; ``kept``: channels that are not masked;
    ``channels``: channels at first; ``condemned``: channels that are fading out; ``nonfinite``: rows of
    gradients left out of the statistics; ``finished``: 0 or 1.
    """
    network.rows.table.settle()
    masks, whole = network.masks, network.whole
    cost = network.graph.cost(masks.unmasked)
    return {
        "step": events.done(),
        "macs": int(cost.macs),
        "params": int(cost.params),
        "macs_share": cost.macs / max(whole.macs, 1),
        "params_share": cost.params / max(whole.params, 1),
        "kept": int(masks.unmasked.sum()),
        "channels": network.rows.total,
        "condemned": int((masks.state == FADING).sum()),
        "nonfinite": int(network.rows.table.nonfinite),
        "finished": int(events.finished),
    }


def widths(network: Network) -> dict[str, tuple[int, int]]:
    """See :meth:`sparsekern.Pruner.widths`."""
    network.rows.table.settle()
    unmasked, found = network.masks.unmasked, dict[str, tuple[int, int]]()
    seen: Counter[str] = Counter()
    for group, width in zip(network.graph.groups, network.widths.tolist(), strict=True):
        seen[group.name] += 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}"
        found[name] = int(unmasked[group.channels].sum()), width
    return found


def described(network: Network, events: Events, settings: Settings) -> str:
    """A Pruner's ``repr``: its model and optimizer, the budget, and the progress."""
    keep, of, steps = settings.keep, settings.policy.of, settings.timing.steps
    share = network.share(of, network.masks.unmasked)
    return (
        f"Pruner({type(network.model).__name__}, {type(network.optimizer).__name__}, keep={keep:g}, "
        f"of={of!r}, step {events.done()} of {steps}: {share:.1%} of {of} left, "
        f"{'finished' if events.finished else 'not finished'})"
    )
