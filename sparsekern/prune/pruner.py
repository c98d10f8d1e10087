"""The object that a user adds to a training: it watches the optimizer's steps and removes channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern import optim
from sparsekern.compact import Plan, compact, make_plan
from sparsekern.graph import ChannelGraph, dry_run, trace
from sparsekern.prune import criteria
from sparsekern.prune.allocate import Allocator, Global, Problem
from sparsekern.prune.budget import (
    check_feasible,
    check_keep,
    check_unit,
    resolve_floors,
    resolve_round_to,
)
from sparsekern.prune.masking import CONDEMNED, Masks
from sparsekern.prune.schedule import Event, Schedule
from sparsekern.prune.statistics import ChannelRows, Statistics, gather

NONFINITE = ("ignore", "raise")


class Pruner:
    """Prunes a model's channels while an optimizer trains it.

    Nothing has to be called during training: the optimizer's steps count gradients, penalise and mask (in the
    same pass for :mod:`sparsekern.optim`, through hooks around the step for any other optimizer), and after
    some of them channels are condemned, decline to zero and are masked, until the budget is met.

    Args:
        model: the model to prune, where it is trained (also the result of ``torch.compile``).
        optimizer: holds the model's trainable parameters; also one of ``torch.optim`` or a user's own.
        example_inputs: a tensor or a tuple of the positional arguments of ``model``, of a size that the model
            is used with; MACs are those of one forward pass on them.
        keep: share of the dense cost that stays, in (0, 1].
        of: the cost, ``"macs"`` or ``"params"``.
        steps: optimizer steps of the whole training.
        select: the criterion that ranks channels; default :func:`sparsekern.criteria.default`.
        allocate: decides the widths of the groups; default :class:`sparsekern.allocate.Global`.
        warmup: share of ``steps`` before the first channel is condemned.
        finish: share of ``steps`` by which the budget is met; the rest trains the smaller network.
        events: how many times channels are condemned between the two.
        round_to: group widths are multiples of this, or unchanged; ``"auto"`` chooses for the device.
        min_channels: channels that every group keeps, or such numbers by pattern of group names.
        protect: modules, parameters or name patterns that keep their shape, outputs and inputs.
        penalty: how far the gates of the channels next in line decay from one event to the next, beside their
            training: by a factor of about ``exp(-penalty)``; 0 for none.
        nonfinite: a gradient with NaN or infinity never enters the statistics. ``"ignore"`` leaves the update
            to the optimizer; ``"raise"`` checks all gradients before each step (a pass over them and, on a
            GPU, a synchronisation) and raises a FloatingPointError while nothing has changed.

    Attributes:
        graph: the channels, their groups and their cost.

    Raises:
        ValueError: an argument is out of range, no channel can be removed, ``keep`` is below what floors and
            frozen layers allow, the optimizer lacks trainable parameters of the model, or ``example_inputs``
            are not accepted by the model. Nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        keep: float,
        of: str = "macs",
        steps: int,
        select: criteria.Criterion | None = None,
        allocate: Allocator | None = None,
        warmup: float = 0.1,
        finish: float = 0.6,
        events: int = 10,
        round_to: int | str = 1,
        min_channels: int | Mapping[str, int] = 1,
        protect: Sequence[str | nn.Module | nn.Parameter] = (),
        penalty: float = 0.1,
        nonfinite: str = "ignore",
    ) -> None:
        self._keep = check_keep(keep)
        self._of = check_unit(of)
        _check_options(select, allocate, penalty, nonfinite)
        self._schedule = Schedule.cubic(
            steps=steps, keep=self._keep, warmup=warmup, finish=finish, events=events
        )
        # torch.compile wraps the module; its parameters are those of the one inside.
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._optimizer = optimizer
        self._select = select or criteria.default()
        self._allocate = allocate or Global()
        self._penalty = float(penalty)
        self._round_to = resolve_round_to(round_to, self._model)
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False))
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.graph = _prunable_graph(self._model, example_inputs, protect, self._parameters, trained)
        self._floors = resolve_floors(min_channels, self.graph)
        everything = np.ones(self.graph.num_channels, bool)
        self._dense = self.graph.cost(everything)
        check_feasible(self._problem(np.zeros(len(everything)), everything, self._keep), self._keep)

        # A mean over about one interval between events: each decision rests on what came since the last one.
        interval = max(10, self._schedule.events[0].decline)
        self._rows = ChannelRows(self._model, self.graph, trained, decay=1 - 1 / interval)
        self._masks = Masks(self.graph, self._rows, self._parameters, optim.state_tensors(optimizer))
        self._step = 0
        self._nonfinite_seen = 0
        self._next = self._next_step()
        self._handle = optim.attach(optimizer, self._rows.table)
        self._hooks = [optimizer.register_step_post_hook(self._after_step)]
        if nonfinite == "raise":
            self._hooks.append(optimizer.register_step_pre_hook(self._check_gradients))

    @property
    def finished(self) -> bool:
        """Whether the budget is met and nothing is condemned any more."""
        return self._step >= self._schedule.finish and not (self._masks.state == CONDEMNED).any()

    def plan(self, keep: float | None = None) -> Plan:
        """What stays of the model.

        Args:
            keep: None for the channels that are not masked: the compact model is then exactly the masked one.
                A share of the dense cost plans that budget anew, from the statistics gathered so far and
                among the channels not masked; the result is then not the trained network without zeros.

        Raises:
            ValueError: ``keep`` is out of range or below what floors and frozen layers allow.
        """
        if keep is None:
            return make_plan(self.graph, self._masks.unmasked)
        share = check_keep(keep)
        statistics = gather(self._rows, self.graph, self._masks.unmasked, self._parameters)
        problem = self._problem(self._saliency(statistics), statistics.live, share)
        check_feasible(problem, share)
        return make_plan(self.graph, self._allocate(problem))

    def compact(self) -> nn.Module:
        """A copy of the model without its masked channels, computing exactly what the masked model computes.

        Channels that are only condemned are still there: see :attr:`finished`.
        """
        return compact(self._model, self.plan())

    def abort(self) -> int:
        """Undo the latest decision where it can be undone: condemned channels live again.

        Their gates stay as far as they have declined, and train on from there.

        Returns:
            How many channels were saved.
        """
        return int(self._masks.pardon().sum())

    def detach(self) -> None:
        """Stop watching the optimizer; masked channels stay zero only as long as nobody trains them."""
        self._handle.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def metrics(self) -> dict[str, Any]:
        """Where the pruning stands, for logs; all values are plain numbers, strings and lists.

        ``step``; ``macs``, ``params`` of the network without its masked channels and ``macs_share``,
        ``params_share`` of the dense one; per group ``group_names``, ``kept`` and ``channels`` (all);
        ``condemned``: channels on their way to zero; ``nonfinite``: rows of gradients left out of the
        statistics; ``finished``.
        """
        unmasked = self._masks.unmasked
        cost = self.graph.cost(unmasked)
        return {
            "step": self._step,
            "macs": int(cost.macs),
            "params": int(cost.params),
            "macs_share": cost.macs / max(self._dense.macs, 1),
            "params_share": cost.params / max(self._dense.params, 1),
            "group_names": [group.name for group in self.graph.groups],
            "kept": [int(unmasked[group.channels].sum()) for group in self.graph.groups],
            "channels": [len(group.channels) for group in self.graph.groups],
            "condemned": int((self._masks.state == CONDEMNED).sum()),
            "nonfinite": int(self._rows.table.nonfinite),
            "finished": self.finished,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs beside the model and the optimizer, copied; tensors and
        plain values only, so that ``torch.load(weights_only=True)`` reads it."""
        table = self._rows.table.state_dict()
        return {
            "version": 1,
            "settings": self._settings(),
            "network": self._fingerprint(),
            "step": self._step,
            "next": self._next,
            "nonfinite_seen": self._nonfinite_seen,
            "channels": torch.from_numpy(self._masks.state.copy()),
            "rows": {key: v.clone() if isinstance(v, Tensor) else v for key, v in table.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; model and optimizer are loaded by themselves, before or after.

        Raises:
            ValueError: it is of another network or of a Pruner with other settings; nothing has changed then.
        """
        if state.get("version") != 1:
            raise ValueError(f"state: got version {state.get('version')!r}, expected 1")
        if list(state["network"]) != self._fingerprint():
            raise ValueError(
                f"state: got the channels of another network ({len(state['network'])} groups), expected "
                f"those of this one ({len(self.graph.groups)} groups)"
            )
        for name, own in self._settings().items():
            if state["settings"].get(name) != own:
                raise ValueError(
                    f"state: was saved with {name}={state['settings'].get(name)!r}, expected {own!r}"
                )
        self._rows.table.load_state_dict(state["rows"])
        self._masks.state[:] = state["channels"].cpu().numpy()
        self._step = int(state["step"])
        self._next = state["next"]
        self._nonfinite_seen = int(state["nonfinite_seen"])
        self._masks.zero()

    def _settings(self) -> dict[str, Any]:
        return {
            "keep": self._keep,
            "of": self._of,
            "events": [[event.step, event.share, event.decline] for event in self._schedule.events],
            "finish": self._schedule.finish,
            "select": repr(self._select),
            "allocate": repr(self._allocate),
            "round_to": self._round_to,
            "floors": self._floors.tolist(),
            "penalty": self._penalty,
        }

    def _fingerprint(self) -> list[str]:
        return [f"{group.name}:{len(group.channels)}" for group in self.graph.groups]

    def _problem(self, saliency: np.ndarray, live: np.ndarray, share: float) -> Problem:
        budget = share * getattr(self._dense, self._of)
        return Problem(self.graph, saliency, live, budget, self._of, self._floors, self._round_to)

    def _check_gradients(self, *_: Any) -> None:
        bad = [
            name
            for name, param in self._model.named_parameters()
            if param.grad is not None and not bool(torch.isfinite(param.grad).all())
        ]
        if bad:
            raise FloatingPointError(
                f"gradient: got NaN or infinity in {', '.join(bad[:3])} ({len(bad)} parameters), expected "
                f"finite values; nonfinite='ignore' lets the optimizer go on"
            )

    def _after_step(self, *_: Any) -> None:
        self._step += 1
        if self._step == self._next:
            self._decide()

    def _decide(self) -> None:
        self._masks.mask(self._masks.declined())
        event = self._schedule.at(self._step)
        if event is not None:
            self._condemn(event)
        self._next = self._next_step()
        self._warn_of_nonfinite()

    def _next_step(self) -> int | None:
        """The step after which there is something to do next, or None."""
        event = self._schedule.after(self._step)
        if event is not None:
            return event.step
        if self._step < self._schedule.finish:
            return self._schedule.finish
        # Steps that a gradient scaler skipped leave declines unfinished: come back when they can have ended.
        left = int(self._masks.countdowns().max(initial=0))
        return self._step + left if left else None

    def _condemn(self, event: Event) -> None:
        live = self._masks.live
        statistics = gather(self._rows, self.graph, live, self._parameters)
        saliency = self._saliency(statistics)
        kept = self._allocate(self._problem(saliency, live, event.share))
        condemned = live & ~kept
        partners = self._select.partners(statistics, saliency)
        if partners is not None:
            folded = self._masks.fold(condemned, partners)
            self._masks.mask(folded)
            condemned &= ~folded
        self._masks.condemn(condemned, event.decline)
        self._penalise_next(event, saliency, kept)

    def _penalise_next(self, event: Event, saliency: np.ndarray, kept: np.ndarray) -> None:
        """Extra decay for the gates of those channels that would go at the next event."""
        following = self._schedule.after(event.step)
        if not self._penalty or following is None:
            self._masks.penalise(np.zeros_like(kept), 0.0)
            return
        then = self._allocate(self._problem(saliency, kept, following.share))
        group = self._optimizer.param_groups[0]
        momentum = float(group.get("momentum", 0.0))
        # A step takes off lr * penalty, and a momentum buffer repeats that 1 / (1 - momentum) times.
        rate = float(group["lr"]) * event.decline / (1 - momentum)
        self._masks.penalise(kept & ~then, self._penalty / rate if rate > 0 else 0.0)

    def _saliency(self, statistics: Statistics) -> np.ndarray:
        saliency = np.asarray(self._select(statistics), np.float64)
        if saliency.shape != (self.graph.num_channels,) or not np.isfinite(saliency).all():
            raise ValueError(
                f"select: {self._select!r} gave an array of shape {saliency.shape} with "
                f"{int((~np.isfinite(saliency)).sum())} non-finite values, expected "
                f"[{self.graph.num_channels}] finite ones"
            )
        return saliency

    def _warn_of_nonfinite(self) -> None:
        count = int(self._rows.table.nonfinite)
        if count > self._nonfinite_seen:
            warnings.warn(
                f"{count - self._nonfinite_seen} rows of gradients with NaN or infinity were left out of the "
                f"pruning statistics; nonfinite='raise' stops at the first one",
                stacklevel=2,
            )
            self._nonfinite_seen = count


def _check_options(select: object, allocate: object, penalty: object, nonfinite: object) -> None:
    if select is not None and not isinstance(select, criteria.Criterion):
        raise ValueError(f"select: got {select!r}, expected a sparsekern.criteria.Criterion")
    if allocate is not None and not isinstance(allocate, Allocator):
        raise ValueError(f"allocate: got {allocate!r}, expected a sparsekern.allocate.Allocator")
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
        raise ValueError(f"penalty: got {penalty!r}, expected a number >= 0")
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite: got {nonfinite!r}, expected one of {NONFINITE}")


def _prunable_graph(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    protect: Sequence[str | nn.Module | nn.Parameter],
    parameters: Mapping[str, nn.Parameter],
    trained: set[int],
) -> ChannelGraph:
    """The model's graph, without groups that are not trained and those that a dry run found wanting."""
    _check_held(parameters, trained)
    graph = trace(model, example_inputs, protect=protect)
    idle = [
        group.name
        for group in graph.groups
        if not any(id(parameters[name]) in trained for name in _gate_names(graph, group.channels))
    ]
    if idle:
        graph = graph.freeze(idle, "its gates are not trained, so nothing is known of its channels")
        graph = dry_run(model, graph, example_inputs)
    if not graph.num_channels:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in graph.frozen[:3])
        raise ValueError(
            f"model: {type(model).__name__} has no channel that can be removed, expected at least one "
            f"({reasons})"
        )
    return graph


def _gate_names(graph: ChannelGraph, channels: np.ndarray) -> set[str]:
    first = int(channels[0])
    span = slice(int(graph.gates.offsets[first]), int(graph.gates.offsets[first + 1]))
    return {graph.gates.names[index] for index in graph.gates.tensors[span]}


def _check_held(parameters: Mapping[str, nn.Parameter], trained: set[int]) -> None:
    missing = [name for name, p in parameters.items() if p.requires_grad and id(p) not in trained]
    if missing:
        raise ValueError(
            f"optimizer: does not hold {len(missing)} trainable parameters of the model "
            f"({', '.join(missing[:3])}), expected all that require a gradient"
        )
