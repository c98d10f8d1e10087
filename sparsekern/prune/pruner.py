"""The Pruner, which a user adds to a training: it watches the optimizer's steps and removes channels."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.compact import Plan
from sparsekern.compact.optimizer_state import StateCutter
from sparsekern.compact.reshard import Shard
from sparsekern.compact.verify import as_arguments
from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import unwrap
from sparsekern.graph import ChannelGraph
from sparsekern.optim import unwrap_optimizer
from sparsekern.prune.calibration import ForwardLoss
from sparsekern.prune.compaction import Compaction
from sparsekern.prune.decide import criteria
from sparsekern.prune.decide.allocate import Allocator
from sparsekern.prune.decide.budget import Unit, check_keep, round_to_choices
from sparsekern.prune.decide.policy import Policy
from sparsekern.prune.decide.roles import Equal
from sparsekern.prune.decide.settings import Settings
from sparsekern.prune.forecast import Forecast, Forecaster
from sparsekern.prune.prunable import prunable_graph
from sparsekern.prune.resharding import Resharding
from sparsekern.prune.run import progress
from sparsekern.prune.run.events import Events
from sparsekern.prune.run.gradient_check import GradientCheck, check_nonfinite
from sparsekern.prune.run.watch import Watch, abandoned
from sparsekern.prune.save.checkpoint import Checkpoint
from sparsekern.prune.save.saved_state import SavedState
from sparsekern.prune.schedule import Timing
from sparsekern.prune.shrinkable import check_shrinkable
from sparsekern.prune.state.network import Network
from sparsekern.prune.state.statistics import trained_by
from sparsekern.runtimes import Runtime

StrPath = str | os.PathLike[str]


class Pruner:
    """Prunes a model's channels while an optimizer trains it; training code needs no further call.

    The optimizer's steps gather statistics of gradients and apply penalties and masks: in the same pass for
    :mod:`sparsekern.optim`, through hooks around the step for any other optimizer. At each event the Pruner
    chooses channels. Their gates fade to zero until the next event masks them. The last one meets the budget.

    Args:
        model: the model on the device where it is trained, possibly inside ``torch.compile`` or
            ``DistributedDataParallel``, or sharded by ``fully_shard``. Every process makes a Pruner.
        optimizer: holds the model's trainable parameters; of ``torch.optim`` or any other, possibly wrapped.
        example_inputs: a tensor or a tuple of the positional arguments of ``model``; costs are those of one
            forward pass on them, with the keyword arguments ``example_kwargs``.
        keep: share of the dense cost that stays, in (0, 1].
        of: the cost: ``"macs"``, ``"params"``, or ``"latency"``, the time of a forward pass in ``runtime`` on
            this machine with its threads (:mod:`sparsekern.latency`); ``round_to="auto"`` suits it.
        steps: optimizer steps of the whole training.
        select: the criterion that ranks channels, default :func:`sparsekern.criteria.default`; or names such
            as ``"taylor"`` or ``"taylor * gradient-count"``.
        allocate: sets the widths of the groups, default :class:`sparsekern.allocate.Global`; or its name.
        warmup: share of ``steps`` before the first event, in [0, 1).
        finish: share of ``steps`` by which the budget is met. The other steps train the smaller network.
        events: number of times that channels are chosen between ``warmup`` and ``finish``.
        round_to: layer widths are multiples of this number, or stay unchanged. ``"auto"`` chooses it for the
            device, and a smaller one where ``keep`` needs it. Default: ``"auto"`` with ``shrink``, else 1.
        min_channels: channels that every group keeps at least, or such numbers by pattern of group names.
        protect: modules, parameters or name patterns whose shape, outputs and inputs stay as they are.
        exact: False also allows channels whose removal changes values of others (:func:`sparsekern.trace`).
        equal: ``"role"``, the default with a Hugging Face ``config``, keeps the same part of all layers as
            wide, a mapping also by divisors; ``"config"`` keeps what it cannot say whole (docs/settings.md).
        penalty: extra decay >= 0 of the gates of channels that would go, about ``exp(-penalty)`` an event.
        nonfinite: response to NaN or infinity in gradients, which no statistics count: ``"ignore"`` goes on,
            ``"raise"`` checks all gradients before each step and raises a FloatingPointError.
        shrink: cut masked channels out of the live model at every event, for cheaper steps (:meth:`shrink`).
        depth: also remove whole residual blocks; ``min_channels={"layers": 4}`` keeps 4 of such a list.
        also: copies of the model that are masked and cut in the same way, such as an ``AveragedModel``.
        state_cutter: ``(parameter, name, value, TensorPlan) -> smaller value`` for unusual optimizer state.
        cache: directory of timings for latency; default ``$SPARSEKERN_CACHE``, else the user's cache.
        process_group: the processes that train together; default: those of DDP, else the default group.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, see :func:`sparsekern.optim.unwrap_optimizer`.
        ValueError: an argument is out of range, no channel can be removed, floors and frozen layers do not
            allow ``keep``, the optimizer lacks trainable parameters of the model, the model does not accept
            ``example_inputs``, or it is sharded and ``shrink`` is True (:meth:`reshard` is the way there).
        RuntimeError: the optimizer's steps already drive a Pruner of some of the parameters, or the processes
            differ in their arguments or models. Nothing has changed after any exception.
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
        equal: Equal = "auto",
        penalty: float = 0.1,
        nonfinite: str = "ignore",
        shrink: bool = False,
        depth: bool = False,
        also: Sequence[nn.Module] = (),
        state_cutter: StateCutter | None = None,
        cache: StrPath | None = None,
        process_group: Any = None,
    ) -> None:
        begin = perf_counter()
        share = check_keep(keep)
        policy = Policy.from_arguments(select, allocate, of, penalty, runtime, depth, equal)
        checks_gradients, timing = check_nonfinite(nonfinite), Timing(steps, warmup, finish, events)
        schedule = timing.schedule(share)
        wrapped, model, unwrapped = model, unwrap(model), unwrap_optimizer(optimizer)
        replaced = abandoned(unwrapped.optimizer, model)
        state_check = check_shrinkable(model, unwrapped, state_cutter) if shrink else None
        example, trained = as_arguments(example_inputs, example_kwargs), trained_by(unwrapped.optimizer)
        graph = prunable_graph(model, trained, example_inputs, protect, exact, example_kwargs, depth, equal)
        choices = round_to_choices(round_to, model, bool(shrink))
        network = Network(model, unwrapped, graph, schedule.decay, policy.counts, also, state_cutter)
        ranks = Ranks(wrapped, process_group, network.device)
        time = functools.partial(network.time, example, ranks=ranks, cache=cache, runtime=runtime)
        policy = policy.fitted(network, share, min_channels, choices, time)
        settings = Settings(share, policy, timing, bool(shrink))
        settings.agree(ranks, network.fingerprint(), nonfinite)
        self._network, self._settings = network, settings
        self._events = Events(network, policy, schedule, ranks, shrinks=bool(shrink))
        self._compaction = Compaction(settings, network, self._events, ranks)
        self._checkpoint = Checkpoint(SavedState(settings, network, self._events), network, ranks)
        self._resharding = Resharding(wrapped, optimizer, network, ranks, self._checkpoint.saved)
        self._watch = Watch(self, network, self._events)
        self._watch.attach(replaced, GradientCheck(network, ranks) if checks_gradients else None, state_check)
        self._forecaster = Forecaster(network, settings, self._events, example, begin)

    def __repr__(self) -> str:
        return progress.described(self._network, self._events, self._settings)

    @property
    def graph(self) -> ChannelGraph:
        """The channels of the live model, their groups and their cost."""
        return self._network.graph

    @property
    def finished(self) -> bool:
        """Whether the budget is met and no channel is fading out any more."""
        return self._events.finished

    def plan(self, keep: float | None = None, *, of: Unit | None = None) -> Plan:
        """The channels that stay, relative to the model's size when the Pruner was made.

        Args:
            keep: None plans the channels that are not masked; the compact model then equals the masked one.
                A share of the dense cost plans that budget; the compact model then computes something else.
            of: the cost of that share; None for the Pruner's own. ``"latency"`` only for a Pruner of latency.

        Raises:
            ValueError: ``keep`` or ``of`` is not valid, or floors and frozen layers do not allow ``keep``.
            RuntimeError: weights were written into masked rows, see :meth:`remask`.

        Warns:
            UserWarning: without ``keep``, as for :meth:`compact`.
        """
        return self._compaction.plan(keep, of)

    def compact(self) -> nn.Module:
        """A copy of the model without its masked channels; its outputs equal those of the masked model.

        Channels that still fade out are kept; wait for :attr:`finished`. For a sharded model all processes
        have to call this, and each gets a plain module.

        Raises:
            RuntimeError: weights were written into masked rows (:meth:`remask`), or a parameter was replaced.

        Warns:
            UserWarning: the budget is not met yet; the text names the share reached and the reason.
        """
        return self._compaction.compact()

    def shrink(self, also: Sequence[nn.Module] = ()) -> bool:
        """Cut the masked channels out of the live model now, with its optimizer's state.

        All modules, tensors and groups stay the same objects, and hooks, learning rate schedulers and
        gradient scalers keep working. The next step has the loss of the masked model, up to rounding and
        random numbers drawn by size (dropout). ``torch.compile`` compiles once more, and a captured CUDA
        graph has to be captured anew.

        Args:
            also: further copies of the model, such as an ``AveragedModel``, besides the Pruner's own.

        Returns:
            Whether there were masked channels to cut.

        Raises:
            TypeError, ValueError: optimizer state cannot be cut, or an entry of ``also`` is not a copy.
            RuntimeError: weights were written into masked rows, see :meth:`remask`. Nothing has changed after
                any exception. Ctrl-C waits until everything is smaller.
        """
        return self._events.shrink(also)

    def reshard(self, shard: Shard, state: Mapping[str, Any] | None = None) -> tuple[nn.Module, Any]:
        """Put a smaller model in place of one sharded by ``fully_shard``; return it and its optimizer.

        The optimizer stays the same object, and training goes on as after :meth:`shrink`. All processes have
        to call this between steps. Without masked channels the present model stays, at no cost.

        Args:
            shard: applies ``fully_shard`` to the smaller model, as the user did before; returns None or it.
            state: a :meth:`state_dict` to load, at whose size the model is made.

        Raises:
            TypeError, ValueError: the model, ``shard``, its result or ``state`` is not valid.
            RuntimeError: another process failed. Until all have sharded, the former model stays in use.
        """
        return self._resharding.reshard(shard, state)

    def capturing(self) -> AbstractContextManager[None]:
        """A block that captures optimizer steps in a CUDA graph; :meth:`advance` counts those of replays."""
        return self._events.capturing()

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` >= 1 that replays of a CUDA graph have made, and decide if an event is due."""
        self._events.advance(steps)

    def remask(self) -> int:
        """Zero the rows of masked channels, the columns that read them, and their optimizer state again.

        Call it after other code than ``load_state_dict`` wrote weights to masked channels. Until then
        :meth:`compact`, :meth:`plan`, :meth:`shrink`, :meth:`save_checkpoint` and the next decision raise a
        RuntimeError. The result is the number of rows that were not zero.

        Raises:
            RuntimeError: a parameter was replaced: the model and the optimizer hold different objects.
        """
        return self._network.remask()

    def forecast(
        self, *, ranks: int = 1, measure: Any = False, forward_loss: ForwardLoss | None = None
    ) -> Forecast:
        """The cost of the training, stage by stage; call this before the training begins.

        Args:
            ranks: processes that average their gradients.
            measure: False assumes that all layers keep an equal share. Anything else times steps, see
                :meth:`sparsekern.prune.forecast.Forecaster.forecast`.
            forward_loss: ``forward_loss(model, batch)`` returns the loss of a copy on the batch ``measure``.

        Raises:
            TypeError, ValueError, RuntimeError: as in that method.
        """
        return self._forecaster.forecast(ranks, measure, forward_loss)

    def abort(self) -> int:
        """Make the channels that are fading out live again, from their faded gates; return their number."""
        return self._events.abort()

    def detach(self) -> None:
        """Stop watching the optimizer. Masked channels then stay zero only until a step trains them."""
        self._watch.detach()

    def metrics(self) -> dict[str, int | float]:
        """The state of the pruning for loggers; :func:`sparsekern.prune.run.progress.metrics` lists it."""
        return progress.metrics(self._network, self._events)

    def widths(self) -> dict[str, tuple[int, int]]:
        """``{group: (channels that are not masked, channels at first)}``; a repeated name gets ``#2``, ..."""
        return progress.widths(self._network)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state that a resumed training needs besides the model and the optimizer.

        ``torch.load(weights_only=True)`` reads it. Counts of activations are those of this process alone.
        """
        return self._checkpoint.saved.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], also: Sequence[nn.Module] = ()) -> None:
        """Go on from a :meth:`state_dict`, in a full-size model or one of the size in the state.

        This cuts the model, its optimizer's state and its copies to their size in the state; load their
        values afterwards. With other ``steps`` than the saved ones the training is extended: events after the
        saved step are those of this Pruner's schedule, and none if all are over.

        Args:
            state: a result of :meth:`state_dict`.
            also: as for :meth:`shrink`.

        Raises:
            ValueError: the state has another network or other settings, or needs more ``steps`` to meet its
                budget. Nothing has changed after any exception. Ctrl-C waits until everything is loaded.
        """
        self._checkpoint.saved.load(state, also)

    def save_checkpoint(self, path: StrPath, **extra: Any) -> None:
        """Write model, optimizer, Pruner, copies, random generators and ``extra`` to one file.

        An existing file stays until the new one is complete and on the disk. If several processes train
        together, all have to call this. The first one writes, with the generators of all.

        Args:
            path: a file name.
            extra: tensors and plain values by name, such as ``scheduler=scheduler.state_dict()``.

        Raises:
            OSError: ``path`` cannot be written.
            ValueError: a value of ``extra`` has another type, or the model is sharded. Nothing is written.
            RuntimeError: the writing process failed, or weights were written into masked rows.
        """
        self._checkpoint.save(path, extra)

    def load_checkpoint(self, path: StrPath, *, also: Sequence[nn.Module] = ()) -> dict[str, Any]:
        """Go on from :meth:`save_checkpoint`, bit by bit, in a full-size model with its optimizer and Pruner.

        Other ``steps`` extend the training, see :meth:`load_state_dict`; the caller extends a learning rate
        schedule. Every process has to call this; more processes than before reuse the saved generators.

        Args:
            path: the file; no code from it is run.
            also: further copies of the model to cut to its size. The file does not hold their values.

        Returns:
            The extra values.

        Raises:
            OSError: ``path`` cannot be read.
            ValueError: the file is damaged or not a checkpoint, or belongs to another network, optimizer or
                settings, or the model is sharded.
            RuntimeError: another process failed or read another file. Nothing has changed after any error.
        """
        return self._checkpoint.load(path, also)


def check_run(
    pruner: Pruner, state: Mapping[str, Any], weights: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> None:
    """Check that a Pruner, its model and its optimizer can load these state dicts, before any of them does.

    Raises:
        ValueError: one of them does not fit. Nothing has changed.
    """
    pruner._checkpoint.check(state, weights, optimizer)
