"""Maps the rows of the kernels to the channels of pruning, and computes statistics of channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.distributed.tensors import whole
from sparsekern.graph import ChannelGraph, Group
from sparsekern.kernels.rows import GRAD_SQ, WEIGHT_SQ, RowTable
from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.sharded import row_table


def trained_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """``id`` of every parameter that the optimizer holds and that requires a gradient."""
    held = (param for group in optimizer.param_groups for param in group["params"])
    return {id(param) for param in held if param.requires_grad}


class ChannelRows:
    """The rows of each channel, and the channel of each row.

    Attributes:
        table: the flat per-row arrays of all parameters in ``trained`` that have channels.
        channel_of: int64 ``[R]``, channel of each row, -1 for a row that is never pruned alone.
        block_of: int64 ``[R]``, channel that stands for the block whose writers have the row, or -1.
        inside: int64 ``[R]``, channel that stands for the block that has the row's parameter, or -1.
        is_gate: bool ``[R]``; rows of gates. If no gate of a channel is trained (a batch norm whose affine
            parameters are frozen), its trained filters replace them.
        stands_in: bool ``[C]``; channels whose filters replace their gates.
        is_producer: bool ``[R]``; rows that are filters: output channels of a weight that makes the channel.
        numbers: int64 ``[C]``; number of each channel in the dense model.
        total: number of channels of the dense model.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, trained: set[int], *, decay: float) -> None:
        """``trained`` is the result of :func:`trained_by`, ``decay`` that of the exponential means."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tracked: list[tuple[nn.Parameter, int]] = []
        channels: list[np.ndarray] = []
        writers = {name: block.channel for block in graph.blocks for name in block.writers}
        holders = {name: block.channel for block in graph.blocks for name in block.tensors}
        self._trained = trained
        self._spans: dict[str, slice] = {}
        start = 0
        for name, slots in graph.tensors.items():
            if slots.kind != "parameter" or slots.row_dim is None:
                continue
            of_rows = slots.channels[slots.row_dim]
            if of_rows is None or not (name in writers or (of_rows >= 0).any()):
                continue
            param = parameters[name]
            if id(param) not in trained:
                # Masks zero these rows, but statistics do not count them.
                continue
            self._spans[name] = slice(start, start + len(of_rows))
            tracked.append((param, slots.row_dim))
            channels.append(of_rows)
            start += len(of_rows)
        self.channel_of = np.concatenate(channels) if channels else np.zeros(0, np.int64)
        self.block_of = np.full(start, -1, np.int64)
        self.inside = np.full(start, -1, np.int64)
        for name, own in self._spans.items():
            self.block_of[own], self.inside[own] = writers.get(name, -1), holders.get(name, -1)
        self.num_channels = self.total = graph.num_channels
        self.numbers = np.arange(self.total)
        self.is_producer = self._mark_producers(graph)
        offsets, rows, self.stands_in = self._gate_rows(graph)
        self.is_gate = np.zeros(start, bool)
        self.is_gate[rows] = True
        self.table = row_table(tracked, (offsets, rows), decay=decay)

    def restricted_state(self, kept: np.ndarray) -> dict[str, Any]:
        """The table's state for a network with only the channels ``kept`` (bool ``[C]``)."""
        return self.table.restricted(self.kept_rows(kept), kept)

    def kept_rows(self, kept: np.ndarray) -> np.ndarray:
        """The rows that a network with only the channels ``kept`` (bool ``[C]``) has, bool ``[R]``."""
        stays = np.append(kept, True)
        rows: np.ndarray = stays[self.channel_of] & stays[self.inside]
        return rows

    def restricted(self, model: nn.Module, graph: ChannelGraph, kept: np.ndarray) -> ChannelRows:
        """The rows of the channels ``kept`` (bool ``[C]``), with their statistics.

        Args:
            model: the smaller model, the same object as before or another.
            graph: its channels.
            kept: the channels that it keeps.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trained = self._trained
        if trained.isdisjoint(map(id, parameters.values())):
            # Another model: its parameters have the same names.
            trained = {id(parameters[name]) for name in self._spans}
        rows = ChannelRows(model, graph, trained, decay=self.table.decay)
        rows.table.load_state_dict(self.restricted_state(kept))
        rows.numbers, rows.total = self.numbers[kept], self.total
        return rows

    def _mark_producers(self, graph: ChannelGraph) -> np.ndarray:
        marks = np.zeros(len(self.channel_of), bool)
        for group in graph.groups:
            for name in group.producers:
                if (rows := self._spans.get(name)) is not None:
                    marks[rows] |= np.isin(self.channel_of[rows], group.channels)
        return marks

    def _gate_rows(self, graph: ChannelGraph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The graph's gates as rows of the flat arrays, without gates of untrained parameters.

        Returns:
            offsets: int64 ``[C + 1]``; channel ``c`` has ``rows[offsets[c]:offsets[c + 1]]``.
            rows: int64; rows of the gates, or of the filters that replace them, channel by channel.
            stands_in: bool ``[C]``; channels whose filters replace their gates.
        """
        gates = graph.gates
        starts = np.array([self._spans[n].start if n in self._spans else -1 for n in gates.names], np.int64)
        channel = np.repeat(np.arange(graph.num_channels), np.diff(gates.offsets))
        first = starts[gates.tensors] if len(gates.tensors) else np.zeros(0, np.int64)
        held = first >= 0
        rows, channel = (first + gates.rows)[held], channel[held]
        without = np.bincount(channel, minlength=graph.num_channels) == 0
        filters = np.flatnonzero(self.is_producer & (self.channel_of >= 0) & without[self.channel_of])
        rows = np.concatenate([rows, filters])
        channel = np.concatenate([channel, self.channel_of[filters]])
        rows = rows[np.argsort(channel, kind="stable")]
        offsets = np.zeros(graph.num_channels + 1, np.int64)
        np.cumsum(np.bincount(channel, minlength=graph.num_channels), out=offsets[1:])
        return offsets, rows, without

    def moving(self) -> np.ndarray:
        """bool ``[R]``; rows of parameters that require a gradient now. Only these fade in a step."""
        moves = np.zeros(len(self.channel_of), bool)
        for view in self.table.views:
            moves[view.slice] = view.param.requires_grad
        return moves

    def span(self, name: str) -> slice | None:
        """The slice of a parameter's rows in the flat arrays, None if it is not trained."""
        return self._spans.get(name)

    def select(self, chosen: np.ndarray, *, gates_only: bool = False) -> Tensor:
        """Bool ``[R]`` on the table's device: the rows of the channels ``chosen`` (bool ``[C]``)."""
        rows = chosen[self.channel_of] & (self.channel_of >= 0)
        if gates_only:
            rows &= self.is_gate
        rows |= chosen[self.block_of] & (self.block_of >= 0)
        return torch.from_numpy(rows).to(self.table.countdown.device)

    def sums_over_blocks(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of a per-row quantity ``[R]`` over the writers of each block, and the numbers of their rows.

        Both are float64 ``[C]``, and 0 for channels that stand for no block.
        """
        held = self.block_of >= 0
        sums = np.bincount(self.block_of[held], weights=values[held], minlength=self.num_channels)
        return sums, np.bincount(self.block_of[held], minlength=self.num_channels)

    def mean_over_producers(self, values: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Mean of a per-row quantity ``[R]`` over each channel's filters, float64 ``[C]``.

        For a channel without a filter (a bare parameter) it is the mean over all of its rows. Filters inside
        of blocks that are not ``live`` (bool ``[C]``) do not count, as they do not in a shrunk network.
        """
        filters = self.is_producer & (self.channel_of >= 0) & np.append(live, True)[self.inside]
        has_filter = np.zeros(self.num_channels, bool)
        has_filter[self.channel_of[filters]] = True
        counted = filters | ((self.channel_of >= 0) & ~has_filter[self.channel_of])
        channel = self.channel_of[counted]
        total = np.bincount(channel, weights=values[counted], minlength=self.num_channels)
        rows = np.bincount(channel, minlength=self.num_channels)
        return total / np.maximum(rows, 1)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The input of a criterion at an event: arrays over channels, float64 ``[C]`` unless stated otherwise.

    Attributes:
        graph: the groups that the channels form.
        live: bool ``[C]``; channels that are neither fading out nor masked.
        activity: share of a filter's gradient elements above its threshold, mean over steps, in [0, 1]. For
            a block, which is one more channel, the mean over the rows of its writers.
        taylor: root of the mean over steps of (gradient . weight)^2 over the channel's gates: the first-order
            change of the loss when the channel is scaled to zero.
        magnitude: l2 norm of the channel's filters (root mean square over several producers). For a block,
            the sum of the norms of its writers' rows.
        activation_counts: the share as in ``activity``, but of the gradients that reach the channel's
            activation, counted by fused normalisations (:func:`sparsekern.fusion.fuse`). Channels without
            one have ``activity``; None if nothing is counted.
        parameters: the model's parameters by name, for criteria that use the filters themselves; DTensors
            if the model is sharded.
        numbers: int64 ``[C]``; number of each channel in the dense network.
        total: number of channels of the dense network, by default the network of ``graph``.
    """

    graph: ChannelGraph
    live: np.ndarray
    activity: np.ndarray
    taylor: np.ndarray
    magnitude: np.ndarray
    parameters: Mapping[str, nn.Parameter]
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    total: int = 0
    activation_counts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not self.total:
            object.__setattr__(self, "total", self.graph.num_channels)
            object.__setattr__(self, "numbers", np.arange(self.total))

    def per_group(self, reduce: Callable[[np.ndarray], float], values: np.ndarray) -> np.ndarray:
        """``reduce`` over the live channels of each group, repeated for all its channels; 0 without any."""
        spread = np.zeros_like(values)
        for group in self.graph.groups:
            alive = values[group.channels][self.live[group.channels]]
            spread[group.channels] = reduce(alive) if len(alive) else 0.0
        return spread


@torch.no_grad()
def sum_weight_squares(table: RowTable) -> None:
    """Fill in the table's sums of squared weights, which otherwise a step computes."""
    for view in table.views:
        rows = view.param.movedim(view.dim, 0).reshape(view.rows, -1)
        table.sums[view.slice, WEIGHT_SQ] = rows.double().square().sum(1).float()


def gather(
    rows: ChannelRows,
    graph: ChannelGraph,
    live: np.ndarray,
    parameters: Mapping[str, nn.Parameter],
    activations: Activations | None = None,
) -> Statistics:
    """Read the kernels' arrays (one synchronisation on a GPU) into :class:`Statistics`."""
    table = rows.table
    updates = float(table.updates)
    # The means start at zero, so early values are too small without this correction.
    unbias = 1.0 / max(1.0 - table.decay**updates, 1e-12) if updates else 0.0
    activity = table.activity.double().cpu().numpy() * unbias
    weight_sq = table.sums[:, WEIGHT_SQ].double().cpu().numpy()
    dot_sq = table.channel_dot_sq.double().cpu().numpy() * unbias
    share = rows.mean_over_producers(activity, live)
    taylor = np.sqrt(dot_sq)
    if rows.stands_in.any():
        taylor = np.where(rows.stands_in, np.maximum(taylor, _directional_taylor(rows)), taylor)
    magnitude = np.sqrt(rows.mean_over_producers(weight_sq, live))
    if graph.blocks:
        norms, count = rows.sums_over_blocks(np.sqrt(weight_sq))
        share = np.where(count > 0, rows.sums_over_blocks(activity)[0] / np.maximum(count, 1), share)
        magnitude = np.where(count > 0, norms, magnitude)
    counted = None if activations is None else activations.shares(graph.num_channels)
    return Statistics(
        graph=graph,
        live=live.copy(),
        activity=share,
        taylor=taylor,
        magnitude=magnitude,
        parameters=parameters,
        numbers=rows.numbers,
        total=rows.total,
        activation_counts=None if counted is None else np.where(np.isnan(counted), share, counted),
    )


def _directional_taylor(rows: ChannelRows) -> np.ndarray:
    """``||gradient|| * ||filter|| / sqrt(elements)`` of each channel in the last step, float64 ``[C]``.

    A normalisation removes a filter's scale, so ``gradient . filter`` is 0 even for an important filter. This
    value is the root mean square of that product over all directions of the gradient. It has the units of a
    Taylor term, so such channels compare with others.
    """
    sums, elements = rows.table.sums.double().cpu().numpy(), rows.table.elements.cpu().numpy()
    filters = np.flatnonzero(rows.is_producer & (rows.channel_of >= 0))
    squares = sums[filters, GRAD_SQ] * sums[filters, WEIGHT_SQ] / elements[filters]
    return np.sqrt(np.bincount(rows.channel_of[filters], weights=squares, minlength=rows.num_channels))


def weight_statistics(model: nn.Module, graph: ChannelGraph) -> Statistics:
    """Statistics of the weights alone; ``activity`` and ``taylor`` are 0."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    rows = ChannelRows(model, graph, {id(param) for param in parameters.values()}, decay=0.0)
    sum_weight_squares(rows.table)
    return gather(rows, graph, graph.all_channels(), parameters)


@torch.no_grad()
def effective_filters(group: Group, statistics: Statistics) -> Tensor:
    """The group's filters as vectors whose inner products are the channels' inner products.

    After a batch norm an output channel is ``gamma * n + beta`` with ``n`` of unit variance. For white inputs
    the ``n`` of two filters correlate like the filters. So the vector is ``[gamma * w / ||w||, beta]``, or
    ``[w, b]`` without a normalisation. The filters of several producers are normalised and concatenated.

    Returns:
        float32 ``[channels of the group, features]`` on the parameters' device, rows in the group's order.
    """
    gates = gate_vectors(group, statistics)
    parts = []
    gone = statistics.graph.tensors_without(statistics.live)
    producers = [name for name in group.producers if name not in gone]
    for name in producers:
        slots = statistics.graph.tensors[name]
        assert slots.row_dim is not None
        weight = whole(statistics.parameters[name]).float().movedim(slots.row_dim, 0).flatten(1)
        rows = first_rows(slots.channels[slots.row_dim], group.channels)
        weight = weight[torch.from_numpy(rows).to(weight.device)]
        if len(producers) > 1 or gates.normalised:
            weight = torch.nn.functional.normalize(weight, dim=1)
        parts.append(weight)
    if len(producers) == 1 and gates.scale is not None:
        parts[0] = parts[0] * gates.scale[:, None]
    if len(producers) == 1 and gates.shift is not None:
        parts.append(gates.shift[:, None])
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, eq=False)
class GateVectors:
    """gamma and beta (or the bias) of a group's channels, float32 ``[channels]``; None for a missing one."""

    scale: Tensor | None
    shift: Tensor | None
    normalised: bool


def gate_vectors(group: Group, statistics: Statistics) -> GateVectors:
    """Scale and shift of the group's channels; None for one that the group has not exactly once."""
    graph = statistics.graph
    first = int(group.channels[0])
    span = slice(int(graph.gates.offsets[first]), int(graph.gates.offsets[first + 1]))
    gone = graph.tensors_without(statistics.live)
    names = [graph.gates.names[index] for index in graph.gates.tensors[span]]
    names = [name for name in names if name not in gone]
    vectors = [name for name in names if name not in group.producers]

    def values(suffix: str) -> Tensor | None:
        matching = [name for name in vectors if name.endswith(suffix)]
        if len(matching) != 1:
            return None
        slots = graph.tensors[matching[0]]
        param = whole(statistics.parameters[matching[0]]).float().flatten()
        rows = first_rows(slots.channels[0], group.channels)
        return param[torch.from_numpy(rows).to(param.device)]

    scale = values("weight")
    return GateVectors(scale, values("bias"), normalised=scale is not None)


def first_rows(channels: np.ndarray | None, wanted: np.ndarray) -> np.ndarray:
    """For each wanted channel, its first index in ``channels``, int64."""
    assert channels is not None
    order = np.argsort(channels, kind="stable")
    return order[np.searchsorted(channels[order], wanted)]
