"""The Pruner, which a user adds to a training: it watches the optimizer's steps and removes channels."""

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
from sparsekern.runtimes import Runtime


class Pruner(Resumable):
    """Prunes a model's channels while an optimizer trains it.

    Training code needs no further call. The optimizer's steps gather statistics of gradients and apply
    penalties and masks: in the same pass for :mod:`sparsekern.optim`, through hooks around the step for any
    other optimizer. At each event the Pruner chooses channels. Their gates fade to zero until the next event
    masks them. The last event meets the budget.

    Args:
        model: the model to prune, on the device where it is trained. It may come from ``torch.compile`` or
            ``DistributedDataParallel``, or be sharded by ``fully_shard``. Every process makes a Pruner.
        optimizer: holds the model's trainable parameters. It may be one of ``torch.optim`` or a user's own,
            and may be wrapped by accelerate, Lightning, a Lookahead or similar.
        example_inputs: a tensor or a tuple of the positional arguments of ``model``, of a size that the model
            is used with. MACs are those of one forward pass on them.
        example_kwargs: keyword arguments of ``model`` for the same forward pass.
        keep: share of the dense cost that stays, in (0, 1].
        of: the cost: ``"macs"``, ``"params"`` or ``"latency"``. Latency is the time of a forward pass on this
            machine with the current threads (:mod:`sparsekern.latency`); ``round_to="auto"`` suits it.
        runtime: for ``of="latency"``, what the network runs in later, see :func:`sparsekern.latency.measure`.
        steps: optimizer steps of the whole training.
        select: the criterion that ranks channels, default :func:`sparsekern.criteria.default`; or names such
            as ``"taylor"`` or ``"taylor * gradient-count"``.
        allocate: decides the widths of the groups, default :class:`sparsekern.allocate.Global`; or its name.
        warmup: share of ``steps`` before the first event.
        finish: share of ``steps`` by which the budget is met. The remaining steps train the smaller network.
        events: number of times that channels are chosen between ``warmup`` and ``finish``.
        round_to: group widths are multiples of this number, or stay unchanged. ``"auto"`` chooses it for the
            device, and a smaller one where ``keep`` needs it. Default: ``"auto"`` with ``shrink``, else 1.
        min_channels: channels that every group keeps at least, or such numbers by pattern of group names.
        protect: modules, parameters or name patterns whose shape, outputs and inputs stay as they are.
        exact: False also allows channels whose removal changes the values of other channels, see
            :func:`sparsekern.trace`. A warning names their groups.
        penalty: extra decay of the gates of the channels that would go at the next event. From one event to
            the next it multiplies them by about ``exp(-penalty)``, besides their training; 0 for none.
        nonfinite: response to gradients with NaN or infinity, which never enter the statistics. ``"ignore"``
            leaves the update to the optimizer. ``"raise"`` checks all gradients before each step, those of
            its closure if it has one, and raises a FloatingPointError before anything changes. The check
            costs a pass over the gradients and, on a GPU, a synchronisation.
        shrink: cut masked channels out of the live model and the optimizer's state at every event, see
            :meth:`shrink`. Steps then cost as much as those of the smaller network. The state must have each
            parameter's shape (or see ``state_cutter``). Channels chosen at one event leave at the next, so
            the training costs the area under a staircase of ``events`` steps.
            :class:`sparsekern.prune.schedule.Schedule` has figures, :meth:`forecast` computes those of a
            model.
        also: copies of the model that are masked and cut in the same way, such as an ``AveragedModel``.
        state_cutter: for an optimizer whose state has other shapes than its parameters:
            ``(parameter, name, value, TensorPlan) -> smaller value``.
        cache: directory of timings of latency; default ``$SPARSEKERN_CACHE``, else the user's cache.
        process_group: the processes that train this model together and check that their decisions agree. None
            means those of ``DistributedDataParallel``, else the default group if there is one.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, see :func:`sparsekern.optim.unwrap_optimizer`.
        ValueError: an argument is out of range, no channel can be removed, ``keep`` is below the smallest
            share that floors and frozen layers allow, the optimizer lacks trainable parameters of the model,
            the model does not accept ``example_inputs``, or ``shrink`` is True for a sharded model. Nothing
            has changed.
        RuntimeError: the optimizer's steps already drive a Pruner of some of the parameters, or the processes
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
        runtime: Runtime = "torch",
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
        of = check_unit(of, runtime)
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
        self._timing = {"warmup": warmup, "finish": finish, "events": events, "runtime": runtime}
        self._example = as_arguments(example_inputs, example_kwargs)
        self._shrinks = bool(shrink)
        graph = prunable_graph(model, trained_by(optimizer), example_inputs, protect, exact, example_kwargs)
        self._policy = Policy(
            select,
            allocate,
            of,
            resolve_floors(min_channels, graph),
            1,  # `rounded` replaces it once the widths of the network are known
            float(penalty),
        )
        choices = round_to_choices(round_to, model, self._shrinks)
        # Averages over about one interval between events, so each decision uses fresh statistics.
        interval = max(10, self._schedule.events[0].fade_steps)
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
        where = {"cache": cache, "runtime": runtime}
        time = functools.partial(self._network.time, self._example, where=where, ranks=self._ranks)
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
            # The check runs before the statistics read the gradients, and torch.compile does not trace it.
            check_gradients = torch.compiler.disable(GradientCheck(self._network, self._ranks))
            hooks.append(optimizer.register_step_pre_hook(check_gradients))
        # A decision that an earlier step left undone runs before anything reads the gradients of this step.
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
        """Whether the budget is met and no channel is fading out any more."""
        return self._events.finished

    def plan(self, keep: float | None = None, *, of: Unit | None = None) -> Plan:
        """The channels that stay, relative to the model's size when the Pruner was made.

        Args:
            keep: None plans the channels that are not masked; the compact model then equals the masked one.
                A share of the dense cost plans that budget anew among the channels that are not masked, from
                the statistics gathered or loaded so far; the compact model then computes something else.
            of: the cost that ``keep`` is a share of; None for the Pruner's own. ``"latency"`` is allowed only
                if the Pruner's own cost is latency.

        Raises:
            ValueError: ``keep`` is out of range or below the smallest share that floors and frozen layers
                allow, or ``of`` is not a known cost, or comes without ``keep``.
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
        """A copy of the model without its masked channels; it computes the same outputs as the masked model.

        Channels that are still fading out are kept; wait for :attr:`finished`. For a sharded model all
        processes have to call this. It gathers one tensor at a time, and each process gets a plain module.

        Raises:
            RuntimeError: weights were written into masked rows, see :meth:`remask`, or a parameter of the
                model is another object than the one that the optimizer holds.

        Warns:
            UserWarning: the budget is not met yet; the text names the share reached and the reason.
        """
        self._network.check_masked(self._ranks if self._network.sharded else None)
        self._warn_of_unfinished()
        return compact(self._network.model, make_plan(self.graph, self._masks.unmasked))

    def shrink(self, also: Sequence[nn.Module] = ()) -> bool:
        """Cut the masked channels out of the live model now, with its optimizer's state.

        Modules, parameters, buffers and the optimizer with its groups and state stay the same objects and
        become smaller. Gradients, statistics and masks follow. Hooks, learning rate schedulers and gradient
        scalers keep working. The next step has the loss of the masked model, up to rounding. Numbers differ
        where random numbers are drawn by size (dropout) or an optimizer reads a whole tensor (Adafactor's
        scale). ``torch.compile`` compiles once more at the next call, and a captured CUDA graph has to be
        captured anew. With ``shrink=True`` the Pruner does this at every event.

        Args:
            also: further copies of the model, such as an ``AveragedModel``, besides the Pruner's own.

        Returns:
            Whether there were masked channels to cut.

        Raises:
            TypeError, ValueError: the optimizer has state that cannot be cut, or an entry of ``also`` is not
                a copy of the model.
            RuntimeError: weights were written into masked rows, see :meth:`remask`. Nothing has changed after
                any exception. Ctrl-C waits until everything is smaller.
        """
        with all_or_nothing() as undo, self._ranks.changing("shrinking the model") as (ready, done):
            self._network.check_masked()
            cut = self._network.shrink(undo, also, ready)
            done()
        return cut

    def remask(self) -> int:
        """Zero the rows of masked channels, the columns that read them, and their optimizer state again.

        ``load_state_dict`` of the model, of its modules and of the optimizer does this by itself. Call it
        after weights were written in another way to channels that were already masked (``parameter.data``,
        ``nn.init``, an average that is copied back). Such weights make the masked network differ from the
        compact one. Until this is called, :meth:`compact`, :meth:`plan`, :meth:`shrink`,
        :meth:`save_checkpoint` and the optimizer's next step with a decision raise a RuntimeError.

        Returns:
            The number of rows that were not zero.

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
        """The cost of the training, stage by stage; call this before the training begins.

        The final widths are not known yet. Without ``measure`` the forecast assumes that all layers keep an
        equal share, within floors and ``round_to``. With ``measure`` it makes the decisions on a copy, from
        the gradients of the first few steps. Without ``shrink`` every step costs as much as a dense one.

        Args:
            ranks: processes that average their gradients.
            measure: whether and on which inputs to time the decisions, and training steps of copies of the
                model at a few sizes, on this machine. True uses the example inputs. A tensor, a tuple of
                positional or a dict of keyword arguments gives other inputs. In both cases the loss is the
                mean square of the outputs. A function takes a copy and returns the training's own loss on a
                batch of its choice. ``torch.compile`` compiles again afterwards.
            forward_loss: ``forward_loss(model, batch)`` returns the loss of a copy on the batch ``measure``,
                which may then have any form.

        Raises:
            TypeError: ``forward_loss`` is not a function.
            ValueError: ``ranks`` is not a whole number of at least 1, a step on these inputs fails, or
                ``forward_loss`` comes without a batch.
            RuntimeError: channels have already been cut out of the model.
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
        """Undo the latest decision as far as possible: channels that are fading out live again.

        Their gates keep the values that they have faded to, and train on from there.

        Returns:
            The number of channels that live again.
        """
        with uninterrupted():
            self._rows.table.settle()
            return int(self._masks.restore().sum())

    def detach(self) -> None:
        """Stop watching the optimizer. Masked channels then stay zero only until a step trains them."""
        self._watch.detach()

    def metrics(self) -> dict[str, int | float]:
        """The state of the pruning for loggers: a flat dict of numbers.

        ``step``: optimizer steps so far; ``macs``, ``params``: cost without the masked channels;
        ``macs_share``, ``params_share``: the same as shares of the dense cost; ``kept``: channels that are
        not masked; ``channels``: channels at first; ``condemned``: channels that are fading out;
        ``nonfinite``: rows of gradients left out of the statistics; ``finished``: 0 or 1. :meth:`widths` has
        each layer's width.
        """
        return progress.metrics(self._network, self._events)

    def widths(self) -> dict[str, tuple[int, int]]:
        """The width of each group: ``{name: (channels that are not masked, channels at first)}``.

        Where several groups share a name, the second one is called ``name#2``, and so on.
        """
        return progress.widths(self._network)

    def _warn_of_unfinished(self) -> None:
        """Warn once for every state in which the network does not meet the budget yet."""
        text = unfinished(self._network, self._policy.of, self._keep, self._events, self._steps)
        state = self._events.step, self._masks.state.tobytes()
        if text and state != self._warned:
            self._warned = state
            warnings.warn(text, UserWarning, stacklevel=3)
