"""The states of a channel: live, fading out, masked; masks become zeros in weights and optimizer state here.

Folding adds a removed channel to its partner.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.distributed.tensors import local, rewritten
from sparsekern.graph import ChannelGraph, Group
from sparsekern.kernels.rows import LIVE as LIVE_ROW
from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.columns import MaskedColumns
from sparsekern.prune.state.partners import Partners
from sparsekern.prune.state.places import Kind, clear, places, tensors_of, written_entries
from sparsekern.prune.state.statistics import ChannelRows
from sparsekern.prune.state.takeover import take_over

LIVE, FADING, MASKED = range(3)


class Masks:
    """The state of every channel, and its effect on rows and weights.

    Attributes:
        state: int8 ``[C]``; ``LIVE``, ``FADING`` or ``MASKED``.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        rows: ChannelRows,
        parameters: Mapping[str, nn.Parameter],
        optimizer_state: Callable[[nn.Parameter], Iterable[Tensor]],
        activations: Activations | None = None,
        model: nn.Module | None = None,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        """Make masks with all channels live.

        Args:
            graph: the channels and the tensors that hold them.
            rows: the rows of the channels.
            parameters: the model's parameters by name.
            optimizer_state: gives the tensors of the optimizer's state of a parameter.
            activations: the fused normalisations, which skip masked channels.
            model: gives the buffers; None where no method has to look at buffers.
            copies: copies of the model that are masked in the same way.
        """
        self.state = np.full(graph.num_channels, LIVE, np.int8)
        self._graph = graph
        self._rows = rows
        self._parameters = parameters
        self._optimizer_state = optimizer_state
        self._activations = activations
        self._places = places(graph)
        self._columns = MaskedColumns(self._places)
        self._model = model
        self._copies = tuple(copies)

    @property
    def live(self) -> np.ndarray:
        """bool ``[C]``; channels that are neither fading out nor masked, nor inside of such a block."""
        return self._graph.without_inner(self.state == LIVE)

    @property
    def unmasked(self) -> np.ndarray:
        """bool ``[C]``; channels that the network still computes with: live or fading out."""
        return self.state != MASKED

    def restored_by(self, undo: ExitStack) -> None:
        """Register on ``undo`` a callback that restores the states of channels and rows, but no weights."""
        table, state, elements = self._rows.table, self.state.copy(), self._rows.table.elements.clone()
        arrays = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in table.state_dict().items()
        }
        activations = self._activations
        counted = None if activations is None else (activations.state_dict(), activations.mask.clone())

        @torch.no_grad()
        def restore() -> None:
            self.state[:] = state
            table.load_state_dict(arrays)
            table.elements.copy_(elements)
            if activations is not None and counted is not None:
                activations.load_state_dict(counted[0])
                activations.mask.copy_(counted[1])
            self.hold_columns()

        undo.callback(restore)

    def fade_out(self, chosen: np.ndarray, fade_steps: int) -> None:
        """Let the gates of the channels ``chosen`` (bool ``[C]``) fade to zero over ``fade_steps`` steps."""
        self.state[chosen] = FADING
        gates = self._rows.select(chosen, gates_only=True) & ~self._rows.select(self.state == MASKED)
        self._rows.table.countdown.masked_fill_(gates, fade_steps)
        self._rows.table.refresh()

    def take_over(self, chosen: np.ndarray, undo: ExitStack | None = None) -> None:
        """Move constants of the channels ``chosen`` (bool ``[C]``; their gates are zero) to their readers."""
        for tensors in self._held() if chosen.any() else ():
            take_over(self._graph, tensors, chosen, undo)

    def mask(self, chosen: np.ndarray, undo: ExitStack | None = None) -> None:
        """Set every row of the channels ``chosen`` to zero for good, with its optimizer state.

        The channels inside of a block that is chosen go with it.
        """
        if not chosen.any():
            # Zeroing visits the whole model and its state, and many events mask no channel.
            return
        chosen = ~self._graph.without_inner(~chosen)
        self.state[chosen] = MASKED
        table = self._rows.table
        table.countdown.masked_fill_(self._rows.select(chosen), 0)
        table.refresh()
        self.zero(undo=undo)

    def hold_columns(self, *, everywhere: bool = False) -> None:
        """Keep the columns of masked channels that are constants at zero in the steps from now on.

        Args:
            everywhere: prepare for channels that are masked later, too, as a captured CUDA graph needs it.
        """
        self._columns.hold(self._parameters, self.state == MASKED, everywhere=everywhere)

    def release_columns(self) -> None:
        """Let steps change all columns again."""
        self._columns.release()

    def zero(self, only: Set[int] | None = None, undo: ExitStack | None = None) -> None:
        """Zero all masked rows, and the columns that read them, with their optimizer state.

        Weights that are loaded do not know the masks, so this also runs after a load. Columns that read zeros
        change no output. But they would count in a filter's norm, and they would send gradients to masked
        gates, which count in a clipped norm of all gradients. Their own gradients are zero, so they stay
        zero; :class:`MaskedColumns` zeroes those of columns that read a constant. Rows of channels that have
        faded out and wait to be masked are zeroed, too.

        Args:
            only: ``id`` of the tensors to zero; None for all.
            undo: receives callbacks that restore the entries.
        """
        masked = self.state == MASKED
        ended = (self._rows.table.countdown == 0).cpu().numpy()
        for place, tensors in itertools.product(self._places, self._held()):
            tensor = tensors.get(place.name)
            if tensor is None or (only is not None and id(tensor) not in only):
                continue
            span = self._rows.span(place.name) if place.kind is Kind.ROW else None
            entries = place.indices(masked) if span is None else np.flatnonzero(ended[span])
            if not len(entries):
                continue
            clear(tensor, place, entries, undo)
            for state in self._optimizer_state(tensor) if isinstance(tensor, nn.Parameter) else ():
                if state.shape == tensor.shape:
                    clear(state, place, entries, undo)
        self._count_elements()
        self.hold_columns()
        if self._activations is not None:
            self._activations.set_masked(masked)

    def count_written(self) -> np.ndarray:
        """int64 ``[C]``; the number of each masked channel's entries that would change the network's output.

        These are rows that are not zero, columns that read a constant and are not zero, and NaN or infinity
        in other columns or in running statistics. For a sharded model only the entries that this process
        holds count.
        """
        masked, count = self.state == MASKED, np.zeros(len(self.state), np.int64)
        if not masked.any():
            return count
        for tensors in self._held():
            found = [(place, place.indices(masked)) for place in self._places if place.name in tensors]
            for (place, _), bad in zip(found, written_entries(tensors, found), strict=True):
                np.add.at(count, place.channels[bad], 1)
        return count

    def _held(self) -> list[Mapping[str, Tensor]]:
        """The tensors of the model and of each copy, by name."""
        return [self._tensors(), *map(tensors_of, self._copies)]

    def _tensors(self) -> Mapping[str, Tensor]:
        buffers = {} if self._model is None else dict(self._model.named_buffers(remove_duplicate=False))
        return {**self._parameters, **buffers}

    def _count_elements(self) -> None:
        """Count only unmasked elements of each row, so that statistics equal those of a compact model."""
        table = self._rows.table
        for name, slots in self._graph.tensors.items():
            view = table.index.get(id(self._parameters[name])) if name in self._parameters else None
            if view is None:
                continue
            size = 1
            for dim, length in enumerate(slots.shape):
                if dim != view.dim:
                    size *= length - len(self._gone(slots.channels[dim]))
            table.elements[view.slice] = max(1, size)

    def _gone(self, channels: np.ndarray | None) -> np.ndarray:
        """The indices of a dimension whose channels are masked; ``channels`` are those of all its indices."""
        if channels is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero((channels >= 0) & (self.state == MASKED)[channels])

    def faded_out(self) -> np.ndarray:
        """bool ``[C]``; fading channels whose gates have reached zero."""
        left = self.countdowns()
        return (self.state == FADING) & (left == 0)

    def countdowns(self) -> np.ndarray:
        """Steps that the gates of each fading channel still need, int64 ``[C]``; 0 for all others.

        They can need more steps than the schedule says, because steps that a gradient scaler skips do not
        count. Gates that the user has frozen since do not count either.
        """
        countdown = self._rows.table.countdown.cpu().numpy()
        gates = self._rows.is_gate & (self._rows.channel_of >= 0) & self._rows.moving()
        left = np.zeros(len(self.state), np.int64)
        np.maximum.at(left, self._rows.channel_of[gates], np.maximum(countdown[gates], 0))
        of_blocks = (self._rows.block_of >= 0) & self._rows.moving()
        np.maximum.at(left, self._rows.block_of[of_blocks], np.maximum(countdown[of_blocks], 0))
        return np.where(self.state == FADING, left, 0)

    def restore(self) -> np.ndarray:
        """Make all fading channels live again, with their present weights.

        Returns:
            bool ``[C]``; these channels.
        """
        restored = self.state == FADING
        self.state[restored] = LIVE
        rows = self._rows.select(restored) & ~self._rows.select(self.state == MASKED)
        self._rows.table.countdown.masked_fill_(rows, LIVE_ROW)
        self._rows.table.refresh()
        return restored

    def penalise(self, chosen: np.ndarray, penalty: float) -> None:
        """Give the gates of the channels ``chosen`` (bool ``[C]``) an extra weight decay, and no other."""
        table = self._rows.table
        table.penalty.zero_()
        table.penalty.masked_fill_(self._rows.select(chosen, gates_only=True), penalty)

    @torch.no_grad()
    def fold(self, fading: np.ndarray, partners: Partners, undo: ExitStack | None = None) -> np.ndarray:
        """Add the columns of redundant channels to those of their partners.

        A channel is folded only if its group has a single producer with at most one normalisation after it,
        its partner stays, and the coefficient is positive (a rectifier does not preserve a negative one).

        Args:
            fading: bool ``[C]``; channels that go.
            partners: the channel that replaces each one.
            undo: receives callbacks that restore the weights.

        Returns:
            bool ``[C]``; the folded channels among ``fading``, to be masked at once.
        """
        partner = partners.channel
        folded = fading & (partner >= 0) & (partners.coefficient > 0)
        folded &= self.live[partner] & ~fading[partner]
        gone = self._graph.tensors_without(self.live)
        for group in self._graph.groups:
            mine = group.channels[folded[group.channels]]
            if not len(mine):
                continue
            if not _foldable(self._graph, group, gone):
                folded[mine] = False
                continue
            for name, dim in group.consumers:
                channels = self._graph.tensors[name].channels[dim]
                if undo is not None:
                    held = local(self._parameters[name])
                    undo.callback(torch.no_grad()(held.copy_), held.clone())
                with rewritten(self._parameters[name]) as weight:
                    _add_columns(weight, dim, channels, mine, partner[mine], partners.coefficient[mine])
        return folded


def _foldable(graph: ChannelGraph, group: Group, gone: Set[str]) -> bool:
    """Whether a channel has one filter and one scale: its value is then linear in the filter's output.

    Tensors of blocks that go (``gone``) do not count.
    """
    if group.masked_columns:
        # Its constant is not scaled with the filter.
        return False
    producers = [name for name in group.producers if name not in gone]
    consumers = dict(group.consumers)
    others = [
        graph.tensors[name]
        for name, _ in group.members
        if name not in consumers and name not in group.producers and name not in gone
    ]
    # At most gamma, beta and a bias before them; a depthwise filter or a second norm differs per channel.
    parameters = [slots for slots in others if slots.kind == "parameter"]
    one_scale = len(parameters) <= 3 and all(len(slots.shape) == 1 for slots in parameters)
    return len(producers) == 1 and bool(consumers) and one_scale


def _add_columns(
    weight: Tensor,
    dim: int,
    channels: np.ndarray | None,
    source: np.ndarray,
    target: np.ndarray,
    coefficient: np.ndarray,
) -> None:
    """``weight[target] += coefficient * weight[source]`` along ``dim``, for all columns of a channel."""
    assert channels is not None
    order = np.argsort(channels, kind="stable")
    ordered = channels[order]
    starts = np.searchsorted(ordered, source)
    # A channel may have many columns (a flattened feature map); both channels order them in the same way.
    width = np.searchsorted(ordered, source, side="right") - starts
    offsets = np.concatenate([np.arange(count) for count in width])
    from_columns = order[np.repeat(starts, width) + offsets]
    to_columns = order[np.repeat(np.searchsorted(ordered, target), width) + offsets]
    shape = [1] * weight.dim()
    shape[dim] = -1
    scale = torch.from_numpy(np.repeat(coefficient, width)).to(weight).reshape(shape)
    moved = weight.index_select(dim, torch.from_numpy(from_columns).to(weight.device)) * scale
    weight.index_add_(dim, torch.from_numpy(to_columns).to(weight.device), moved)
