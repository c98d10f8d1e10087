"""A channel graph as text."""

from __future__ import annotations

import re
from collections import Counter
from typing import Protocol

import numpy as np

from sparsekern.graph.blocks import Block
from sparsekern.graph.cost import Cost
from sparsekern.graph.groups import Gates, Group

_MOST_REASONS = 12


class Described(Protocol):
    """The members of a channel graph that its description reads; see ``ChannelGraph``."""

    @property
    def num_channels(self) -> int: ...
    @property
    def groups(self) -> tuple[Group, ...]: ...
    @property
    def gates(self) -> Gates: ...
    @property
    def frozen(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def untraced(self) -> str: ...
    @property
    def blocks(self) -> tuple[Block, ...]: ...
    def cost(self, kept: np.ndarray) -> Cost: ...
    def price(self, kept: np.ndarray, of: str) -> np.ndarray: ...


def describe(graph: Described) -> str:
    """Describe a channel graph as text.

    Args:
        graph: the channel graph.

    Returns:
        A line of totals, a table of groups, and the reasons why the other weights are not pruned.
    """
    kept = np.ones(graph.num_channels, bool)
    cost = graph.cost(kept)
    prices = [graph.price(kept, of) for of in ("params", "macs")]
    totals = [max(cost.params, 1), max(cost.macs, 1)]
    head = ("group", "channels", "params", "MACs", "made by", "gates")
    rows = [
        (
            group.name,
            str(len(group.channels)),
            *(f"{p[group.channels].sum() / t:.1%}" for p, t in zip(prices, totals, strict=True)),
            _shortened(group.producers),
            _shortened(_gate_names(graph, group)),
        )
        for group in graph.groups
        if len(group.channels) and not group.of_blocks
    ]
    inexact = [f"  {group.name}: {group.inexact}" for group in graph.groups if group.inexact]
    lines = [
        f"{graph.num_channels - len(graph.blocks)} channels in {len(rows)} groups; "
        f"{cost.params:,} parameters, {cost.macs:,} MACs, "
        f"{cost.activations / 2**20:.1f} MiB of activations",
    ]
    lines += _table(head, rows) if rows else []
    if graph.blocks:
        lines += ["", "blocks that can be removed", *_blocks(graph, prices, totals)]
    if inexact:
        lines += ["", "not exact: removing some channels changes the others", *inexact]
    masked = tuple(group.name for group in graph.groups if group.masked_columns)
    if masked:
        lines += ["", f"masked with the columns that read them (not zero themselves): {_shortened(masked)}"]
    if graph.untraced:
        lines += ["", f"training mode was not traced: {graph.untraced}"]
    if graph.frozen:
        lines += ["", "not pruned because"]
        lines += _reasons(graph)
    return "\n".join(lines)


def _blocks(graph: Described, prices: list[np.ndarray], totals: list[int]) -> list[str]:
    """A table of the blocks: the parameters and MACs that go with each, and the layers that end it."""
    rows = [
        (
            block.path,
            str(len(block.groups)),
            *(f"{p[block.channel] / t:.1%}" for p, t in zip(prices, totals, strict=True)),
            _shortened(block.writers),
        )
        for block in graph.blocks
    ]
    return _table(("block", "groups", "params", "MACs", "zero in"), rows)


def _reasons(graph: Described) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in graph.frozen:
        # One line covers all layers with the same kind of reason; ``explain`` names the layer at fault.
        by_reason.setdefault(re.sub(r" in [\w.]+", "", reason, count=1), []).append(name)
    shown = list(by_reason.items())[:_MOST_REASONS]
    lines = [f"  {reason}: {_shortened(tuple(names))}" for reason, names in shown]
    left = sum(len(names) for names in by_reason.values()) - sum(len(n) for _, n in shown)
    return [*lines, f"  and {left} more"] if left else lines


def _gate_names(graph: Described, group: Group) -> tuple[str, ...]:
    if not len(group.channels):
        return ()
    first = int(group.channels[0])
    span = slice(graph.gates.offsets[first], graph.gates.offsets[first + 1])
    return tuple(graph.gates.names[i] for i in Counter(graph.gates.tensors[span].tolist()))


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    numeric = (1, 2, 3)

    def line(row: tuple[str, ...]) -> str:
        cells = (
            cell.rjust(width) if i in numeric else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(head), *(line(row) for row in rows)]
