"""The object that a user adds to a training: it watches the optimizer's steps and removes channels."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.compact import Plan, check_cuttable, compact, make_plan
from sparsekern.compact.optimizer_state import StateCutter
from sparsekern.compact.transaction import all_or_nothing, uninterrupted
from sparsekern.compact.verify import as_arguments
from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import unwrap
from sparsekern.graph import ChannelGraph
from sparsekern.optim import unwrap_optimizer
from sparsekern.prune.calibration import ForwardLoss
from sparsekern.prune.decide import criteria
from sparsekern.prune.decide.allocate import Allocator
from sparsekern.prune.decide.budget import Unit, check_keep, check_unit, resolve_floors, round_to_choices
from sparsekern.prune.decide.names import resolve_allocate, resolve_select
from sparsekern.prune.decide.policy import Policy
from sparsekern.prune.forecast import Forecast, forecast
from sparsekern.prune.optimizer_check import StateCheck, check_state
from sparsekern.prune.preparation import check_counted, check_options, prunable_graph
from sparsekern.prune.probe import loss_to_time
from sparsekern.prune.run import progress
from sparsekern.prune.run.events import Events, unfinished
from sparsekern.prune.run.watch import Watch, abandoned
from sparsekern.prune.save.resume import Resumable
from sparsekern.prune.schedule import Schedule
from sparsekern.prune.state.finite import GradientCheck
from sparsekern.prune.state.masking import Masks
from sparsekern.prune.state.network import Network
from sparsekern.prune.state.statistics import ChannelRows, trained_by


class Pruner(Resumable):
    """Prunes a model's channels while an optimizer trains it.

    Nothing has to be called during training: the optimizer's steps count gradients, penalise and mask (in the
    same pass for :mod:`sparsekern.optim`, through hooks around the step for any other optimizer), and after
    some of them channels are condemned, decline to zero and are masked, until the budget is met.

    Args:
        model: the model to prune, where it is trained; also the result of ``torch.compile`` or
            ``DistributedDataParallel``, or sharded by ``fully_shard``. All processes make a Pruner.
        optimizer: holds the model's trainable parameters; also one of ``torch.optim`` or a user's own, and
            also inside of what accelerate, Lightning, a Lookahead and such wrap around it.
        example_inputs: a tensor or a tuple of the positional arguments of ``model``, of a size that the model
            is used with; MACs are those of one forward pass on them.
        example_kwargs: keyword arguments of ``model`` that go with them.
        keep: share of the dense cost that stays, in (0, 1].
        of: the cost: ``"macs"``, ``"params"``, or ``"latency"``: the time of a forward pass on this machine,
            with the threads that are set now (:mod:`sparsekern.latency`; ``round_to="auto"`` suits it).
        steps: optimizer steps of the whole training.
        select: the criterion that ranks channels, default :func:`sparsekern.criteria.default`; or names such
            as ``"taylor"`` or ``"taylor * gradient-count"``.
        allocate: decides the widths of the groups, default :class:`sparsekern.allocate.Global`; or its name.
        warmup: share of ``steps`` before the first channel is condemned.
        finish: share of ``steps`` by which the budget is met; the rest trains the smaller network.
        events: how many times channels are condemned between the two.
        round_to: group widths are multiples of this, or unchanged; ``"auto"``, the default with ``shrink``,
            chooses for the device, and less where ``keep`` cannot be met with that; else the default is 1.
        min_channels: channels that every group keeps, or such numbers by pattern of group names.
        protect: modules, parameters or name patterns that keep their shape, outputs and inputs.
        exact: False allows channels, too, whose removal changes what the others compute, see
            :func:`sparsekern.trace`; a warning names their groups.
        penalty: how far the gates of the channels next in line decay from one event to the next, beside their
            training: by a factor of about ``exp(-penalty)``; 0 for none.
        nonfinite: a gradient with NaN or infinity never enters the statistics. ``"ignore"`` leaves the update
            to the optimizer; ``"raise"`` checks all gradients before each step, those of its closure if it
            has one (a pass over them and, on a GPU, a synchronisation), and raises a FloatingPointError while
            nothing has changed.
        shrink: cut masked channels out of the live model at every event, with the optimizer's state, which
            has to have each parameter's shape (or see ``state_cutter``), see :meth:`shrink`: from then on a
            step costs what the smaller network costs. What is condemned at one event leaves at the next, so
            the training costs the area under a staircase of ``events`` steps, see
            :class:`sparsekern.prune.schedule.Schedule` for figures and :meth:`forecast` for those of a model.
        also: copies of the model that are masked and cut alike, such as an ``AveragedModel`` of
            ``torch.optim.swa_utils``.
        state_cutter: for an optimizer that keeps state of another shape than its parameters:
            ``(parameter, name, value, TensorPlan) -> smaller value``.
        cache: the directory of timings for ``of="latency"``; default ``$SPARSEKERN_CACHE``, else the user's.
        process_group: the processes that train this model together and check that they decide alike; None for
            those of ``DistributedDataParallel``, else the default group where there is one.

    Raises:
        TypeError: ``optimizer`` is none, see :func:`sparsekern.optim.unwrap_optimizer`.
        ValueError: an argument is out of range, no channel can be removed, ``keep`` is below what floors and
            frozen layers allow, the optimizer lacks trainable parameters of the model, ``example_inputs``
            are not accepted by the model, or ``shrink`` is asked of a sharded one. Nothing has been changed
            then.
        RuntimeError: the optimizer's steps drive a Pruner of some of the parameters already, or the processes
            differ in their arguments or models, here or at a later decision.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        keep: float,
        of: Unit = "macs",
        steps: int,
        select: criteria.Criterion | str | None = None,
        allocate: Allocator | str | None = None,
        warmup: float = 0.1,
        finish: float = 0.6,
        events: int = 10,
        round_to: int | str | None = None,
        min_channels: int | Mapping[str, int] = 1,
        protect: Sequence[str | nn.Module | nn.Parameter] = (),
        exact: bool = True,
        penalty: float = 0.1,
        nonfinite: str = "ignore",
        shrink: bool = False,
        also: Sequence[nn.Module] = (),
        state_cutter: StateCutter | None = None,
        cache: str | os.PathLike[str] | None = None,
        process_group: Any = None,
    ) -> None:
        begin = perf_counter()
        self._keep = check_keep(keep)
        of = check_unit(of)
        select, allocate = resolve_select(select), resolve_allocate(allocate)
        check_options(penalty, nonfinite)
        self._schedule = Schedule.cubic(
            steps=steps, keep=self._keep, warmup=warmup, finish=finish, events=events
        )
        given, model = model, unwrap(model)
        if shrink:
            check_cuttable(model)
        self._optimizer = optimizer = (unwrapped := unwrap_optimizer(optimizer)).optimizer
        orphans = abandoned(optimizer, model)
        if checks_state := shrink and state_cutter is None:
            check_state(unwrapped)
        self._steps = steps
        self._timing = {"warmup": warmup, "finish": finish, "events": events}
        self._example = as_arguments(example_inputs, example_kwargs)
        self._shrinks = bool(shrink)
        graph = prunable_graph(model, trained_by(optimizer), example_inputs, protect, exact, example_kwargs)
        self._policy = Policy(
            select,
            allocate,
            of,
            resolve_floors(min_channels, graph),
            1,  # until it is known what the network is wide enough for
            float(penalty),
        )
        choices = round_to_choices(round_to, model, self._shrinks)
        # A mean over about one interval between events: each decision rests on what came since the last one.
        interval = max(10, self._schedule.events[0].decline)
        self._network = Network(
            model,
            unwrapped,
            graph,
            decay=1 - 1 / interval,
            counting=self._policy.select.needs_activations,
            also=also,
            state_cutter=state_cutter,
        )
        check_counted(self._policy.select, self._network.activations)
        self._ranks = Ranks(given, process_group, self._rows.table.countdown.device)
        time = functools.partial(self._network.time, self._example, cache=cache, ranks=self._ranks)
        self._policy = self._policy.rounded(self._network, choices, self._keep, time)
        with self._ranks.agreeing("the Pruner's arguments and the channels of its model") as check:
            check(self._settings(), self._fingerprint(), nonfinite)
        self._events = Events(self._network, self._policy, self._schedule, self._ranks, shrinks=self._shrinks)
        self._warned: tuple[Any, ...] = ()
        self._watch = Watch(self, self._network, self._events)
        hooks = self._watch.hooks
        for watch in orphans:
            watch.detach()
        if nonfinite == "raise":
            # Before the statistics look at the gradients, and outside of a trace.
            check_gradients = torch.compiler.disable(GradientCheck(self._network, self._ranks))
            hooks.append(optimizer.register_step_pre_hook(check_gradients))
        # Before anything looks at the gradients of a step: what an earlier step has left undone.
        catch_up = torch.compiler.disable(self._events.before_step)
        hooks.append(optimizer.register_step_pre_hook(catch_up))
        self._network.attach()
        if checks_state:
            hooks.append(StateCheck(unwrapped))
        hooks.append(optimizer.register_step_post_hook(self._watch))
        self._seconds = perf_counter() - begin

    def __repr__(self) -> str:
        return progress.described(self._network, self._events, self._keep, self._policy.of, self._steps)

    @property
    def graph(self) -> ChannelGraph:
        """The channels of the live model, their groups and their cost."""
        return self._network.graph

    @property
    def _masks(self) -> Masks:
        return self._network.masks

    @property
    def _rows(self) -> ChannelRows:
        return self._network.rows

    @property
    def finished(self) -> bool:
        """Whether the budget is met and nothing is condemned any more."""
        return self._events.finished

    def plan(self, keep: float | None = None, *, of: Unit | None = None) -> Plan:
        """What stays of the model, relative to the size that it had when the Pruner was made.

        Args:
            keep: None for the channels that are not masked: the compact model is then exactly the masked one.
                A share of the dense cost plans that budget anew, from the statistics gathered so far, or
                loaded, and among the channels not masked; the result is then not the trained network without
                zeros.
            of: the cost that ``keep`` is a share of; None for the Pruner's own. ``"latency"`` only where it
                is that.

        Raises:
            ValueError: ``keep`` is out of range or below what floors and frozen layers allow, or ``of`` is
                not a cost that is known, or comes without ``keep``.
            RuntimeError: weights were written into masked rows, see :meth:`remask`.

        Warns:
            UserWarning: without ``keep``, as for :meth:`compact`.
        """
        if of is not None:
            check_unit(of)
        self._network.check_masked()
        if keep is None:
            if of is not None:
                raise ValueError(f"keep: got None with of={of!r}, expected the share of it that stays")
            self._warn_of_unfinished()
            return self._network.plan(self._masks.unmasked)
        share = check_keep(keep)
        self._rows.table.settle()
        return self._network.plan(self._policy.widths(self._network, share, of))

    def compact(self) -> nn.Module:
        """A copy of the model without its masked channels, computing exactly what the masked model computes.

        Channels that are only condemned are still there: see :attr:`finished`. Of a sharded model all
        processes have to call this; it is gathered one tensor at a time, and each gets an ordinary module.

        Raises:
            RuntimeError: weights were written into masked rows, see :meth:`remask`, or a parameter of the
                model is another object than the one that the optimizer holds.

        Warns:
            UserWarning: the budget is not met yet; with the share reached, and why.
        """
        self._network.check_masked(self._ranks if self._network.sharded else None)
        self._warn_of_unfinished()
        return compact(self._network.model, make_plan(self.graph, self._masks.unmasked))

    def shrink(self, also: Sequence[nn.Module] = ()) -> bool:
        """Cut the masked channels out of the live model now, with its optimizer's state.

        Modules, parameters, buffers, the optimizer with its groups and state stay the same objects and become
        smaller; gradients, statistics and masks move along; hooks, learning rate schedulers and gradient
        scalers see nothing of it. The next step has the loss that the masked model would have had, to
        rounding; where random numbers are drawn by size (dropout) or an optimizer looks at a whole tensor
        (Adafactor's scale), training goes on with other numbers of the same kind. ``torch.compile`` compiles
        once more at the next call, and a captured CUDA graph has to be captured anew. With ``shrink=True``
        this happens by itself at every event.

        Args:
            also: copies of the model, such as an ``AveragedModel``, beside those given to the Pruner.

        Returns:
            Whether there was anything to cut.

        Raises:
            TypeError, ValueError: the optimizer has state whose cut is not known, or an entry of ``also`` is
                no copy of the model.
            RuntimeError: weights were written into masked rows, see :meth:`remask`. Nothing has changed then,
                or after whatever else is raised; Ctrl-C waits until everything is smaller.
        """
        with all_or_nothing() as undo, self._ranks.changing("shrinking the model") as (ready, done):
            self._network.check_masked()
            cut = self._network.shrink(undo, also, ready)
            done()
        return cut

    def remask(self) -> int:
        """Zero again what belongs to masked channels: rows, the columns that read them, optimizer state.

        ``load_state_dict`` of the model, of modules in it and of the optimizer does this by itself. It is for
        weights that were written in another way after their channels had been masked (``parameter.data``,
        ``nn.init``, an average that is copied back), which would make the masked network another one than the
        compact one: until then :meth:`compact`, :meth:`plan`, :meth:`shrink`, :meth:`save_checkpoint` and the
        optimizer's next step with a decision raise a RuntimeError.

        Returns:
            How many rows were not zero.

        Raises:
            RuntimeError: a parameter of the model is another object than the one that the optimizer holds.
        """
        return self._network.remask()

    def forecast(
        self,
        *,
        ranks: int = 1,
        measure: Any = False,
        forward_loss: ForwardLoss | None = None,
    ) -> Forecast:
        """What the training will cost, stage by stage: to be asked before it begins.

        Nothing is known then of which layers will stay wide. Without ``measure`` all are taken to keep an
        equal share, within floors and ``round_to``; with it, the decisions are made on a copy, from the
        gradients of its first few steps. Without ``shrink`` every step costs what a dense one does.

        Args:
            ranks: processes that average their gradients.
            measure: time training steps on this machine, on copies of the model at a few sizes, and the
                decisions: True on the example inputs, or on inputs given here (a tensor, a tuple of
                positional or a dict of keyword arguments), with the mean square of the outputs for a loss;
                or a function that gives the training's own loss of the copy it is called with, on a batch of
                its choice. What ``torch.compile`` has made is made anew afterwards.
            forward_loss: ``forward_loss(model, batch)`` gives the loss of a copy on the batch ``measure``,
                which is of any form then.

        Raises:
            TypeError: ``forward_loss`` is no function.
            ValueError: ``ranks`` is no number of at least 1, no step can be made on these inputs, or
                ``forward_loss`` comes without a batch.
            RuntimeError: channels have been cut out of the model already.
        """
        if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
            raise ValueError(f"ranks: got {ranks!r}, expected a whole number >= 1")
        if self.graph.num_channels != self._rows.total:
            raise RuntimeError("forecast: got a model that has been cut, expected one of full size")
        loss = loss_to_time(measure, forward_loss, self._example, self._network.model)
        return forecast(
            self._network,
            self._policy,
            self._schedule,
            steps=self._steps,
            shrinks=self._shrinks,
            ranks=ranks,
            loss=loss,
            made=self._seconds,
        )

    def abort(self) -> int:
        """Undo the latest decision where it can be undone: condemned channels live again.

        Their gates stay as far as they have declined, and train on from there.

        Returns:
            How many channels were saved.
        """
        with uninterrupted():
            self._rows.table.settle()
            return int(self._masks.pardon().sum())

    def detach(self) -> None:
        """Stop watching the optimizer; masked channels stay zero only as long as nobody trains them."""
        self._watch.detach()

    def metrics(self) -> dict[str, int | float]:
        """Where the pruning stands, for loggers: a flat dict of numbers.

        ``step``; ``macs``, ``params`` of the network without its masked channels and ``macs_share``,
        ``params_share`` of the dense one; ``kept``, ``channels``: how many are not masked, and how many there
        were at first; ``condemned``: channels on their way to zero; ``nonfinite``: rows of gradients left out
        of the statistics; ``finished``: 0 or 1. Widths of layers are in :meth:`widths`.
        """
        return progress.metrics(self._network, self._events)

    def widths(self) -> dict[str, tuple[int, int]]:
        """How wide each group is: ``{name: (channels that are not masked, channels at first)}``.

        A name that several groups have is followed by ``#2`` and so on from the second one on.
        """
        return progress.widths(self._network)

    def _warn_of_unfinished(self) -> None:
        """Once for every state, when what is made of the model now is not what was asked for."""
        text = unfinished(self._network, self._policy.of, self._keep, self._events, self._steps)
        state = self._events.step, self._masks.state.tobytes()
        if text and state != self._warned:
            self._warned = state
            warnings.warn(text, UserWarning, stacklevel=3)
