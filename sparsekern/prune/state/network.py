"""The network under training with all that is known of its channels: what gets smaller together."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern import optim
from sparsekern.compact import Plan, check_copies, make_plan
from sparsekern.compact.load_hooks import listen
from sparsekern.compact.optimizer_state import StateCutter
from sparsekern.compact.plan import shorten
from sparsekern.compact.shrink import cut_all, inside
from sparsekern.compact.surgery import match, registered
from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import is_sharded, settle
from sparsekern.graph import ChannelGraph
from sparsekern.kernels.rows import RowTable
from sparsekern.latency import LatencyModel, measure
from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.content import STATE, check_countdowns, counted_rule, rows_rule
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.places import tensors_of
from sparsekern.prune.state.sharded import Handle, attach
from sparsekern.prune.state.statistics import ChannelRows, trained_by

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
        self.also = tuple(also)
        self.masks = self._masks()
        self._state_cutter = state_cutter
        self._removed = Plan({})
        self._loads: list[Any] = []
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

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the parameters only."""
        return any(map(is_sharded, self.parameters.values()))

    def attach(self) -> None:
        """From now on the optimizer's steps do the work of the rows."""
        self._handle = attach(self.optimizer, self.rows.table)
        self.activations.attach()
        self._loads = listen(self._holders(), self)
        own = weakref.ref(self)

        def loaded(_: Any) -> None:
            if (network := own()) is not None:
                network.masks.zero()

        self._loads.append(self.optimizer.register_load_state_dict_post_hook(loaded))

    def _holders(self) -> list[nn.Module]:
        """The modules that have tensors with channels, or modules with such tensors in them."""
        tracked = {
            id(tensor) for name, tensor in tensors_of(self.model).items() if name in self.graph.tensors
        }
        return [
            module
            for module in self.model.modules()
            if any(id(t) in tracked for t in (*module.parameters(), *module.buffers()))
        ]

    def before_load(self, module: nn.Module, metadata: Mapping[str, Any]) -> None:
        """Refuse to load what would make other parameters than those that the optimizer holds.

        Raises:
            RuntimeError: ``assign=True``; nothing has been loaded.
        """
        if metadata.get("assign_to_params_buffers"):
            raise RuntimeError(
                f"load_state_dict: got assign=True for a {type(module).__name__} that a Pruner watches, "
                f"expected assign=False: the optimizer would go on with parameters that the model no longer "
                f"has; or call pruner.detach() first, and make the optimizer and a Pruner anew afterwards"
            )

    def after_load(self, module: nn.Module) -> None:
        """Zero what a module has loaded into its masked rows and columns."""
        own = (*module._parameters.values(), *module._buffers.values())
        self.masks.zero({id(tensor) for tensor in own if tensor is not None})

    def check_masked(self, ranks: Ranks | None = None) -> None:
        """Everything that was masked is still what the masked network needs: to be called before a decision.

        Args:
            ranks: processes that all call this, each with its part of a sharded model; None to look at the
                part of this process alone.

        Raises:
            RuntimeError: masked rows are not zero, or a parameter is another object than it was; names them.
        """
        problem = self._replaced() or self._written()
        if ranks is not None and ranks.any(bool(problem)) and not problem:
            problem = "masked rows: got some that are not zero in other processes, expected zeros everywhere"
        if problem:
            raise RuntimeError(problem)

    def _replaced(self) -> str:
        settle(self.model)
        tensors = tensors_of(self.model)
        for name, slots in self.graph.tensors.items():
            tensor = tensors.get(name)
            if slots.kind == "parameter" and tensor is not self.parameters[name]:
                now = "none of that name" if tensor is None else "another object of that name"
                return (
                    f"model: got {now} in place of the parameter {name!r} that the optimizer and the Pruner "
                    f"hold, expected the same object; write into it (load_state_dict, parameter.data.copy_), "
                    f"or make the optimizer and a Pruner anew for the model as it is"
                )
            if tensor is None or tuple(tensor.shape) != slots.shape:
                shape = None if tensor is None else list(tensor.shape)
                return (
                    f"model: got {name!r} of shape {shape}, expected {list(slots.shape)} as the Pruner left "
                    f"it; write values of that shape into it"
                )
        return ""

    def _written(self) -> str:
        counts = self.masks.unclean()
        if not counts.any():
            return ""
        own = [(int(counts[group.channels].sum()), group.name) for group in self.graph.groups]
        found = [f"{name} ({count})" for count, name in own if count]
        return (
            f"masked rows: got {int(counts.sum())} that are not zero, of {shorten(found)}, expected zeros: "
            f"weights were written after their channels had been masked; call pruner.remask() to zero them "
            f"again, or take weights from after pruner.finished"
        )

    def remask(self) -> int:
        """Zero again what belongs to masked channels; how many rows were not zero.

        Raises:
            RuntimeError: a parameter is another object than it was.
        """
        if problem := self._replaced():
            raise RuntimeError(problem)
        count = int(self.masks.unclean().sum())
        self.masks.zero()
        return count

    def _masks(self) -> Masks:
        unwrapped = self._unwrapped

        def state(param: Tensor) -> list[Tensor]:
            # A load puts another dict in the place of the optimizer's state.
            return optim.state_tensors(*unwrapped.states)(param)

        names = self.graph.tensors.keys()
        copies = [inside(module, names) for module in self.also]
        return Masks(self.graph, self.rows, self.parameters, state, self.activations, self.model, copies)

    def detach(self) -> None:
        """Take the rows off the optimizer, and the masks off the modules."""
        self.activations.detach()
        if self._handle is not None:
            self._handle.remove()
        for handle in self._loads:
            handle.remove()
        self._loads.clear()

    def plan(self, kept: np.ndarray) -> Plan:
        """What stays of the model before any channel was cut, when ``kept`` (bool ``[C]``) stays now."""
        return self._removed.then(make_plan(self.graph, kept))

    def shrink(
        self, undo: ExitStack, also: Sequence[nn.Module] = (), ready: Callable[[], object] = lambda: None
    ) -> bool:
        """Cut the masked channels out of everything; whether there were any.

        Args:
            undo: is told what restores everything.
            ready: called before the first thing changes.
            also: further copies of the model.

        Raises:
            TypeError, ValueError: see :func:`sparsekern.compact.shrink`.
        """
        if self.masks.unmasked.all():
            ready()
            return False
        self._cut(self.masks.unmasked, also, undo, ready)
        return True

    def _cut(
        self, kept: np.ndarray, also: Sequence[nn.Module], undo: ExitStack, ready: Callable[[], object]
    ) -> None:
        plan, graph = make_plan(self.graph, kept), self.graph.restrict(kept)
        copies = [*self.also, *(module for module in also if module not in self.also)]
        # Undone in the opposite order: the tensors get their sizes back before the old table takes over.
        if self._handle is not None:
            undo.callback(self._handle.replace, self.rows.table)
        undo.callback(vars(self).update, dict(vars(self)))
        cut_all(
            self.model,
            plan,
            undo,
            optimizer=self._unwrapped,
            also=copies,
            state_cutter=self._state_cutter,
            ready=ready,
        )
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

    def shapes(self, kept: np.ndarray) -> dict[int, tuple[int, ...]]:
        """Of the tensors of the model and of its copies, by ``id``, when ``kept`` (bool ``[C]``) stays."""
        plan = make_plan(self.graph, kept)
        parts = match(plan, registered(self.model))
        for copied in check_copies(self.model, plan, self.also):
            parts |= copied
        return {identity: part.new_shape for identity, part in parts.items()}

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
            ValueError: the state is not one of this network, or of it at a larger size.
        """
        STATE.check(state, "state")
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
        # All of these raise for what does not belong here, before anything is changed.
        self.graph.restrict(kept)
        expected = self.rows.restricted_state(kept)
        rows_rule(expected).check(state["rows"], "state['rows']")
        RowTable.check(state["rows"], expected)
        of_rows = np.append(kept, True)[self.rows.channel_of]
        check_countdowns(
            channels[self.rows.numbers],
            state["rows"]["countdown"],
            self.rows.channel_of[of_rows],
            self.rows.is_gate[of_rows],
        )
        if self.activations.counting:
            counted = self.activations.restricted_state(kept)
            Activations.check(state.get("activations"), counted)
            counted_rule(counted).check(state["activations"], "state['activations']")
        return kept

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        also: Sequence[nn.Module],
        undo: ExitStack,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Go on from :meth:`state_dict`, cut to its size; ``undo`` and ``ready`` are as for :meth:`shrink`.

        Raises:
            TypeError, ValueError: see :meth:`check_state` and :func:`sparsekern.compact.shrink`.
        """
        kept = self.check_state(state)
        self.masks.restored_by(undo)
        if kept.all():
            ready()
        else:
            self._cut(kept, also, undo, ready)
        self.rows.table.load_state_dict(dict(state["rows"]))
        if self.activations.counting:
            self.activations.load_state_dict(state["activations"])
        self.masks.state[:] = state["channels"].cpu().numpy()[self.rows.numbers]
        self.masks.zero(undo=undo)
