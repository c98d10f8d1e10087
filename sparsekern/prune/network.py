"""The network under training with all that is known of its channels: what gets smaller together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsekern import optim
from sparsekern._rows import RowTable
from sparsekern.compact import Plan, check_copies, make_plan, shrink
from sparsekern.compact.optimizer_state import StateCutter
from sparsekern.compact.surgery import match, registered
from sparsekern.graph import ChannelGraph
from sparsekern.latency import LatencyModel, measure
from sparsekern.prune.activations import Activations
from sparsekern.prune.masking import Masks
from sparsekern.prune.ranks import Ranks
from sparsekern.prune.sharded import Handle, attach
from sparsekern.prune.statistics import ChannelRows, trained_by

CUT = 3
"""State of a channel that the live network no longer has, beside those of :mod:`masking`."""


class Network:
    """A model, its optimizer, its graph, its rows and its masks, whole or already smaller.

    Attributes:
        model: what is trained, without a wrapper.
        optimizer: whose steps train it, without a wrapper.
        graph: of the model as it is.
        rows, masks, activations: of the channels of ``graph``.
        parameters: the model's, by name.
        latency: of the channels of ``graph``, once :meth:`time` was called.
        whole: cost of the model before any channel was cut out of it.
        widths: int64 ``[groups]``; channels that the groups had then.
        also: copies of the model that are cut with it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | optim.Unwrapped,
        graph: ChannelGraph,
        *,
        decay: float,
        counting: bool = False,
        also: Sequence[nn.Module],
        state_cutter: StateCutter | None,
    ) -> None:
        """Rows of all channels; ``decay`` is that of the statistics, ``counting`` says whether fused
        normalisations count, too.

        Raises:
            TypeError, ValueError: an entry of ``also`` is no copy of the model.
        """
        check_copies(model, make_plan(graph, np.ones(graph.num_channels, bool)), also)
        self._unwrapped = optim.unwrap_optimizer(optimizer)
        self.model, self.optimizer, self.graph = model, self._unwrapped.optimizer, graph
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.latency: LatencyModel | None = None
        self.whole = graph.cost(np.ones(graph.num_channels, bool))
        self._whole_latency = 0.0
        self.widths = np.array([len(group.channels) for group in graph.groups])
        self.rows = ChannelRows(model, graph, trained_by(self.optimizer), decay=decay)
        self.activations = Activations(model, graph, counting=counting, decay=decay)
        self.masks = self._masks()
        self.also = tuple(also)
        self._state_cutter = state_cutter
        self._removed = Plan({})
        self._handle: optim.Attachment | optim.RowHooks | Handle | None = None

    def time(
        self,
        example: tuple[tuple[Any, ...], Mapping[str, Any]],
        round_to: int,
        cache: str | os.PathLike[str] | None,
        ranks: Ranks,
    ) -> None:
        """Find the latency of all sets of channels, that of the first of several processes for all.

        ``example`` are the positional and keyword arguments of a forward pass.

        Raises:
            ValueError: channels were cut out already, and how long the whole network took is not known.
            OSError: the directory ``cache`` cannot be written.
        """
        if not self._removed.removes_nothing:
            raise ValueError("of: got 'latency' for a model that was cut, expected it while it is whole")
        with ranks.agreeing("timing the model") as check:
            latency = measure(
                self.model, self.graph, example[0], example_kwargs=example[1], round_to=round_to, cache=cache
            )
            check()
        latency.values = ranks.first(latency.values)
        self.latency = latency
        self._whole_latency = latency.cost(np.ones(self.graph.num_channels, bool))

    def priced(self, of: str) -> tuple[LatencyModel | None, float]:
        """What prices ``of`` where the graph does not, and what the model cost before any channel was cut.

        Raises:
            ValueError: ``of`` is ``"latency"`` and :meth:`time` was not called.
        """
        if of != "latency":
            return None, int(getattr(self.whole, of))
        if self.latency is None:
            raise ValueError("of: got 'latency', which was not measured; expected of='latency' of the Pruner")
        return self.latency, self._whole_latency

    def share(self, of: str, kept: np.ndarray) -> float:
        """What the channels ``kept`` (bool ``[C]``) cost, over what the model cost before any was cut."""
        latency, whole = self.priced(of)
        cost = getattr(self.graph.cost(kept), of) if latency is None else latency.cost(kept)
        return float(cost) / max(whole, 1e-30)

    def twin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Network:
        """The same for a copy of the model with an optimizer of its own, before any step."""
        own = Network(
            model,
            optimizer,
            self.graph,
            decay=self.rows.table.decay,
            counting=self.activations.counting,
            also=(),
            state_cutter=self._state_cutter,
        )
        own.latency, own._whole_latency = self.latency, self._whole_latency
        return own

    def attach(self) -> None:
        """From now on the optimizer's steps do the work of the rows."""
        self._handle = attach(self.optimizer, self.rows.table)
        self.activations.attach()

    def _masks(self) -> Masks:
        state = optim.state_tensors(*self._unwrapped.states)
        return Masks(self.graph, self.rows, self.parameters, state, self.activations)

    def detach(self) -> None:
        """Take the rows off the optimizer, and the masks off the modules."""
        self.activations.detach()
        if self._handle is not None:
            self._handle.remove()

    def plan(self, kept: np.ndarray) -> Plan:
        """What stays of the model before any channel was cut, when ``kept`` (bool ``[C]``) stays now."""
        return self._removed.then(make_plan(self.graph, kept))

    def shrink(self, also: Sequence[nn.Module] = ()) -> bool:
        """Cut the masked channels out of everything; whether there were any.

        Raises:
            TypeError, ValueError: see :func:`sparsekern.compact.shrink`; nothing has changed then.
        """
        if self.masks.unmasked.all():
            return False
        self._cut(self.masks.unmasked, also)
        return True

    def _cut(self, kept: np.ndarray, also: Sequence[nn.Module]) -> None:
        plan, graph = make_plan(self.graph, kept), self.graph.restrict(kept)
        copies = [*self.also, *(module for module in also if module not in self.also)]
        shrink(self.model, plan, optimizer=self._unwrapped, also=copies, state_cutter=self._state_cutter)
        state = self.masks.state[kept]
        self.rows = self.rows.restricted(self.model, graph, kept)
        self.activations = self.activations.restricted(self.model, graph, kept)
        self.graph = graph
        if self.latency is not None:
            self.latency = self.latency.restrict(graph)
        self.masks = self._masks()
        self.masks.state[:] = state
        if self._handle is not None:
            self._handle.replace(self.rows.table)
            self.activations.attach()
        self._removed = self._removed.then(plan)

    def shapes(self, kept: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Of the model's tensors by every name, when ``kept`` (bool ``[C]``) stays."""
        tensors = registered(self.model)
        parts = match(make_plan(self.graph, kept), tensors)
        return {name: parts[id(entry.tensor)].new_shape for entry in tensors for name in entry.names}

    def state_dict(self) -> dict[str, Any]:
        """``channels``: int8, the state of every channel that there ever was; ``rows``: copies of the arrays
        of those that are left; ``activations``: what fused normalisations have counted, where they do."""
        channels = np.full(self.rows.total, CUT, np.int8)
        channels[self.rows.numbers] = self.masks.state
        arrays = self.rows.table.state_dict()
        rows = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arrays.items()}
        state = {"channels": torch.from_numpy(channels), "rows": rows}
        return state | {"activations": self.activations.state_dict()} if self.activations.counting else state

    def check_state(self, state: Mapping[str, Any]) -> np.ndarray:
        """The channels of this network (bool ``[C]``) that the one of ``state`` has too.

        Raises:
            KeyError, ValueError: the state is not one of this network, or of it at a larger size.
        """
        channels = state["channels"].cpu().numpy()
        if channels.shape != (self.rows.total,) or not np.isin(channels, range(CUT + 1)).all():
            raise ValueError(
                f"state['channels']: got {channels.dtype}{list(channels.shape)}, expected the states of "
                f"{self.rows.total} channels"
            )
        ours = np.zeros(self.rows.total, bool)
        ours[self.rows.numbers] = True
        lost = int(((channels != CUT) & ~ours).sum())
        if lost:
            raise ValueError(
                f"state: has {lost} channels that were cut out of this model since; expected a model of full "
                f"size, with a Pruner of its own, to load it into"
            )
        kept = channels[self.rows.numbers] != CUT
        # Both raise for what does not belong here, before anything is changed.
        self.graph.restrict(kept)
        RowTable.check(state["rows"], self.rows.restricted_state(kept))
        if self.activations.counting:
            Activations.check(state.get("activations"), self.activations.restricted_state(kept))
        return kept

    def load_state_dict(self, state: Mapping[str, Any], also: Sequence[nn.Module] = ()) -> None:
        """Go on from :meth:`state_dict`, cut to its size.

        Raises:
            KeyError, TypeError, ValueError: see :meth:`check_state` and
                :func:`sparsekern.compact.shrink`; nothing has changed then.
        """
        kept = self.check_state(state)
        if not kept.all():
            self._cut(kept, also)
        self.rows.table.load_state_dict(dict(state["rows"]))
        if self.activations.counting:
            self.activations.load_state_dict(state["activations"])
        self.masks.state[:] = state["channels"].cpu().numpy()[self.rows.numbers]
        self.masks.zero()
