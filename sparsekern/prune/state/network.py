"""The network under training with the state of its channels, all of which shrink together."""

from __future__ import annotations

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
from sparsekern.compact.reshard import SmallerModel
from sparsekern.compact.shrink import cut_all, inside, listed
from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import is_sharded, settle
from sparsekern.graph import ChannelGraph
from sparsekern.latency import LatencyModel, measure
from sparsekern.prune.state.activations import Activations
from sparsekern.prune.state.future import Future, future_of
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.places import tensors_of
from sparsekern.prune.state.saved import CUT, kept_by
from sparsekern.prune.state.sharded import Handle, attach
from sparsekern.prune.state.statistics import ChannelRows, trained_by
from sparsekern.prune.state.written import replaced_tensor, written_masked


class Network:
    """A model with its optimizer, graph, rows and masks, at full size or already cut.

    Attributes:
        model: the model in training, without a wrapper.
        optimizer: the optimizer that trains it, without a wrapper.
        graph: the graph of the model at its present size.
        rows, masks, activations: state of the channels of ``graph``.
        parameters: the model's parameters by name.
        latency: latencies for ``graph``; None before :meth:`time`.
        whole: cost of the model before any cut.
        widths: int64 ``[groups]``; channels of the groups before any cut.
        also: copies of the model that are cut with it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Unwrapped,
        graph: ChannelGraph,
        decay: float,
        counting: bool,
        also: Sequence[nn.Module],
        state_cutter: StateCutter | None,
    ) -> None:
        """Make rows and masks of all channels.

        Args:
            model: the model without a wrapper.
            optimizer: the optimizer inside its wrappers.
            graph: the channels of the model.
            decay: decay per step of the running means of statistics, in [0, 1).
            counting: whether fused normalisations count gradients.
            also: copies of the model that are masked and cut with it.
            state_cutter: cuts optimizer state whose shape is not that of its parameter.

        Raises:
            TypeError, ValueError: an entry of ``also`` is not a copy of the model.
        """
        check_copies(model, make_plan(graph, graph.all_channels()), also)
        self._unwrapped = optimizer
        self.model, self.optimizer, self.graph = model, optimizer.optimizer, graph
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.latency: LatencyModel | None = None
        self.whole = graph.cost(graph.all_channels())
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
        *,
        ranks: Ranks,
        **options: Any,
    ) -> None:
        """Measure the latency of all sets of channels; all processes use the times of the first one.

        ``example`` holds the positional and keyword arguments of a forward pass, ``options`` further ones of
        :func:`sparsekern.latency.measure`.

        Raises:
            ValueError: channels were already cut out, so the latency of the dense network is not known.
        """
        if not self._removed.removes_nothing:
            raise ValueError("of: got 'latency' for a model that has been cut, expected one of full size")
        with ranks.agreeing("timing the model") as check:
            args, kwargs = example
            latency = measure(
                self.model, self.graph, args, example_kwargs=kwargs, round_to=round_to, **options
            )
            check()
        latency.values = ranks.first(latency.values)
        self.latency = latency
        self._whole_latency = latency.cost(self.graph.all_channels())

    def priced(self, of: str) -> tuple[LatencyModel | None, float]:
        """The latency model if ``of`` is latency, else None; and the cost of the model before any cut.

        Raises:
            ValueError: ``of`` is ``"latency"`` and :meth:`time` was not called.
        """
        if of != "latency":
            return None, int(getattr(self.whole, of))
        if self.latency is None:
            raise ValueError(
                "of: got 'latency' with a Pruner that has not measured it, expected 'macs' or 'params'; make "
                "the Pruner with of='latency'"
            )
        return self.latency, self._whole_latency

    def share(self, of: str, kept: np.ndarray) -> float:
        """Cost of the channels ``kept`` (bool ``[C]``) over the cost of the model before any cut."""
        latency, whole = self.priced(of)
        cost = getattr(self.graph.cost(kept), of) if latency is None else latency.cost(kept)
        return float(cost) / max(whole, 1e-30)

    def for_copy(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Network:
        """A network for a copy of the model with its own optimizer, before any step."""
        decay, counting = self.rows.table.decay, self.activations.counting
        unwrapped = optim.unwrap_optimizer(optimizer)
        own = Network(model, unwrapped, self.graph, decay, counting, (), self._state_cutter)
        own.latency, own._whole_latency = self.latency, self._whole_latency
        return own

    def fingerprint(self) -> list[str]:
        """Names of all groups with their widths before any cut; networks with the same channels share it."""
        groups = zip(self.graph.groups, self.widths.tolist(), strict=True)
        return [f"{group.name}:{width}" for group, width in groups]

    @property
    def device(self) -> torch.device:
        """The device of the statistics."""
        return self.rows.table.countdown.device

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the parameters."""
        return any(map(is_sharded, self.parameters.values()))

    def attach(self) -> None:
        """Attach rows and masks, so that the optimizer's steps use them from now on."""
        self._handle = attach(self.optimizer, self.rows.table)
        self.activations.attach()
        self._listen()
        own = weakref.ref(self)

        def loaded(_: Any) -> None:
            if (network := own()) is not None:
                network.masks.zero()

        self._loads.append(self.optimizer.register_load_state_dict_post_hook(loaded))

    def _listen(self) -> None:
        """Watch loads of the model's modules."""
        self._loads += listen(self._holders(), self)

    def _holders(self) -> list[nn.Module]:
        """The modules that contain tensors with channels, directly or in submodules."""
        tracked = {
            id(tensor) for name, tensor in tensors_of(self.model).items() if name in self.graph.tensors
        }
        return [
            module
            for module in self.model.modules()
            if any(id(t) in tracked for t in (*module.parameters(), *module.buffers()))
        ]

    def before_load(self, module: nn.Module, metadata: Mapping[str, Any]) -> None:
        """Refuse a load that would replace the parameters that the optimizer holds.

        Raises:
            RuntimeError: the load uses ``assign=True``; nothing has been loaded.
        """
        if metadata.get("assign_to_params_buffers"):
            raise RuntimeError(
                f"load_state_dict: got assign=True for a {type(module).__name__} that a Pruner watches, "
                f"expected assign=False: the optimizer would update parameters that the model no longer has; "
                f"or call pruner.detach() first, and make a new optimizer and a new Pruner afterwards"
            )

    def after_load(self, module: nn.Module) -> None:
        """Zero the masked rows and columns of a module after a load."""
        own = (*module._parameters.values(), *module._buffers.values())
        self.masks.zero({id(tensor) for tensor in own if tensor is not None})

    def check_masked(self, ranks: Ranks | None = None) -> None:
        """Check before a decision that masked rows are still zero, and parameters still the same objects.

        Args:
            ranks: the processes of a sharded model, which all call this; None checks the part of this
                process alone.

        Raises:
            RuntimeError: masked rows are not zero, or a parameter is another object; the text names them.
        """
        problem = self._replaced() or written_masked(self.graph, self.masks)
        if ranks is not None and ranks.any(bool(problem)) and not problem:
            problem = "masked rows: got some that are not zero in other processes, expected zeros everywhere"
        if problem:
            raise RuntimeError(problem)

    def _replaced(self) -> str:
        settle(self.model)
        return replaced_tensor(self.graph, self.parameters, tensors_of(self.model))

    def remask(self) -> int:
        """See :meth:`sparsekern.Pruner.remask`; returns the number of rows that were not zero.

        Raises:
            RuntimeError: a parameter is another object than before.
        """
        if problem := self._replaced():
            raise RuntimeError(problem)
        count = int(self.masks.count_written().sum())
        self.masks.zero()
        return count

    def _masks(self) -> Masks:
        unwrapped = self._unwrapped

        def state(param: Tensor) -> list[Tensor]:
            # A load replaces the dict of the optimizer's state, so it is read at every call.
            return optim.state_tensors(*unwrapped.states)(param)

        names = self.graph.tensors.keys()
        copies = [inside(module, names) for module in self.also]
        return Masks(self.graph, self.rows, self.parameters, state, self.activations, self.model, copies)

    def detach(self) -> None:
        """Detach the rows from the optimizer and the masks from the modules."""
        self.activations.detach()
        self.masks.release_columns()
        if self._handle is not None:
            self._handle.remove()
        for handle in self._loads:
            handle.remove()
        self._loads.clear()

    def plan(self, kept: np.ndarray) -> Plan:
        """The plan from the dense model to the present one cut to ``kept`` (bool ``[C]``)."""
        return self._removed.then(make_plan(self.graph, kept))

    def shrink(
        self, undo: ExitStack, also: Sequence[nn.Module] = (), ready: Callable[[], object] = lambda: None
    ) -> bool:
        """Cut the masked channels out of everything; returns whether there were any.

        Args:
            undo: receives callbacks that restore everything.
            ready: called before the first change.
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
        undo.callback(self.masks.hold_columns)
        copies = [*self.also, *(module for module in listed(also) if module not in self.also)]
        # Undo runs in reverse order: tensors get their sizes back before the old table is attached.
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
        self._restrict(kept, graph, plan)

    def _restrict(
        self, kept: np.ndarray, graph: ChannelGraph, plan: Plan, copies: Mapping[int, nn.Module] | None = None
    ) -> None:
        """Restrict everything but tensors to ``kept``; ``copies`` is as in :meth:`Activations.restricted`."""
        state = self.masks.state[kept]
        if graph.blocks != self.graph.blocks:
            self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.masks.release_columns()
        self.rows = self.rows.restricted(self.model, graph, kept)
        self.activations = self.activations.restricted(self.model, graph, kept, copies)
        self.graph = graph
        if self.latency is not None:
            self.latency = self.latency.restrict(graph)
        self.masks = self._masks()
        self.masks.state[:] = state
        if self._handle is not None:
            self._handle.replace(self.rows.table)
            self.activations.attach()
        self._removed = self._removed.then(plan)

    def smaller(self, kept: np.ndarray) -> SmallerModel:
        """A model of the channels ``kept`` (bool ``[C]``), to be sharded and given to :meth:`go_on_with`.

        Raises:
            ValueError: see :class:`~sparsekern.compact.reshard.SmallerModel`, or the network has copies.
        """
        if self.also:
            raise ValueError(
                f"also: got {len(self.also)} copies of a model that is sharded anew, expected none; keep an "
                f"average of the parameters of each model instead"
            )
        self.activations.check_within(self.model)
        self.graph.restrict(kept)
        return SmallerModel(self.model, make_plan(self.graph, kept), self._unwrapped)

    def go_on_with(self, smaller: SmallerModel, kept: np.ndarray) -> None:
        """Move everything into ``smaller``, the sharded model of the channels ``kept`` (bool ``[C]``)."""
        graph, former = self.graph.restrict(kept), self.model
        smaller.move()
        self.model = smaller.module
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        now = dict(self.model.named_modules())
        copies = {id(module): now[name] for name, module in former.named_modules() if name in now}
        self._restrict(kept, graph, smaller.plan, copies)
        if self._loads:
            self._listen()

    def future(self, kept: np.ndarray) -> Future:
        """The tensors of the model and its copies after a cut to ``kept`` (bool ``[C]``)."""
        return future_of(self.model, self.graph, kept, self.also)

    def state_dict(self) -> dict[str, Any]:
        """``channels``: int8, states of all channels of the dense model; ``rows``: copies of the arrays of
        the present channels; ``activations``: counts of fused normalisations, if they count."""
        channels = np.full(self.rows.total, CUT, np.int8)
        channels[self.rows.numbers] = self.masks.state
        arrays = self.rows.table.state_dict()
        rows = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arrays.items()}
        state = {"channels": torch.from_numpy(channels), "rows": rows}
        return state | {"activations": self.activations.state_dict()} if self.activations.counting else state

    def check_state(self, state: Mapping[str, Any]) -> np.ndarray:
        """The channels of this network (bool ``[C]``) that the network of ``state`` also has.

        Raises:
            ValueError: the state belongs to another network, or to this one at a larger size.
        """
        return kept_by(state, self.graph, self.rows, self.activations)

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        also: Sequence[nn.Module],
        undo: ExitStack,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        """Load a :meth:`state_dict` and cut to its size; ``undo`` and ``ready`` are as for :meth:`shrink`.

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
