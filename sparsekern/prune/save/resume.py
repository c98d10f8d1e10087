"""Interrupting and resuming a training: the state that a Pruner saves and loads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from sparsekern.compact.transaction import all_or_nothing
from sparsekern.distributed.ranks import Ranks
from sparsekern.distributed.tensors import check_plain
from sparsekern.prune.decide.policy import Policy
from sparsekern.prune.run.events import Events
from sparsekern.prune.save import checkpoint
from sparsekern.prune.schedule import Schedule
from sparsekern.prune.state.content import STATE, STATE_VERSION, check_progress
from sparsekern.prune.state.network import Network

# Values of settings that states of earlier versions lack.
_SINCE = {"runtime": "torch"}


class Resumable:
    """The part of a Pruner that saves and loads its state."""

    _network: Network
    _optimizer: torch.optim.Optimizer
    _policy: Policy
    _ranks: Ranks
    _schedule: Schedule
    _steps: int
    _timing: dict[str, Any]
    _keep: float
    _shrinks: bool
    _events: Events

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state that a resumed training needs besides the model and the optimizer.

        It has only tensors and plain values, so ``torch.load(weights_only=True)`` reads it. Counts of
        activations are those of this process, on its share of the data."""
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "schedule": self._events.schedule.to_plain(),
            "network": self._fingerprint(),
            **self._events.state_dict(),
            **self._network.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], also: Sequence[nn.Module] = ()) -> None:
        """Go on from a :meth:`state_dict`, in a full-size model or one of the size in the state.

        This cuts the model, its optimizer's state and copies of the model to their size in the state. It does
        not load their values. If channels were cut, load those after this call, into tensors of that size.

        This Pruner may have other ``steps`` than the saved one; the training is then extended. If all events
        are over, no further ones follow, and the finished network trains for more steps. Otherwise the events
        after the saved step are those of this Pruner's schedule. An event removes nothing while the network
        costs less than the share of that event.

        Args:
            state: a result of :meth:`state_dict`.
            also: as for :meth:`shrink`.

        Raises:
            ValueError: the state belongs to another network or to a Pruner with other settings (apart from
                ``steps``), or the budget is not met and no event is left with these ``steps``. Nothing has
                changed after any exception. Ctrl-C waits until everything is loaded.
        """
        self._check_state(state)
        with all_or_nothing() as undo:
            self._go_on_from(state, also, undo)

    def _go_on_from(
        self,
        state: Mapping[str, Any],
        also: Sequence[nn.Module],
        undo: ExitStack,
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        schedule = self._resumed_schedule(state)
        self._network.load_state_dict(state, also, undo, ready)
        self._events.load_state_dict(state, schedule, undo)
        undo.callback(setattr, self, "_schedule", self._schedule)
        self._schedule = schedule

    def _resumed_schedule(self, state: Mapping[str, Any]) -> Schedule:
        """The schedule of the training after ``state``."""
        saved, step = Schedule.from_plain(state["schedule"]), int(state["step"])
        if saved.after(step) is None or state["settings"]["steps"] == self._steps:
            return saved
        if self._schedule.after(step) is None:
            raise ValueError(
                f"steps: got {self._steps}, whose last event comes after step "
                f"{self._schedule.events[-1].step}, for a state after step {step} that has not met its "
                f"budget; expected more steps"
            )
        return self._schedule

    def _check_state(self, state: Mapping[str, Any]) -> None:
        version = state.get("version", STATE_VERSION) if isinstance(state, Mapping) else STATE_VERSION
        if version != STATE_VERSION:
            raise ValueError(f"state: got version {version!r}, expected {STATE_VERSION}")
        STATE.check(state, "state")
        if list(state["network"]) != self._fingerprint():
            raise ValueError(
                f"state: got the channels of another network ({len(state['network'])} groups), expected "
                f"those of this one ({len(self._network.widths)} groups)"
            )
        for name, own in self._settings().items():
            saved = state["settings"].get(name, _SINCE.get(name))
            if name != "steps" and saved != own:
                raise ValueError(f"state: was saved with {name}={saved!r}, expected {own!r}")
        self._resumed_schedule(state)
        self._network.check_state(state)
        check_progress(state, Schedule.from_plain(state["schedule"]))

    def save_checkpoint(self, path: str | os.PathLike[str], **extra: Any) -> None:
        """Write the whole training to ``path``.

        The file holds the model, the optimizer, the Pruner, the copies given as ``also``, the generators of
        torch, NumPy and Python, and ``extra``. It appears under its name only when it is complete and on the
        disk. An existing file stays whole until then, even if the process is killed. If several processes
        train together, all of them have to call this. The first one writes, with the generators of all.

        Args:
            path: a file name.
            extra: tensors and plain values by name, such as ``scheduler=scheduler.state_dict()``.

        Raises:
            OSError: ``path`` cannot be written.
            ValueError: a value of ``extra`` has another type, or the model is sharded. Nothing has been
                written.
            RuntimeError: the writing process failed, or weights were written into masked rows, see
                :meth:`remask`.
        """
        network = self._network
        _check_whole(network.model)
        with self._ranks.agreeing("saving a checkpoint") as check:
            network.check_masked()
            check()
        # Each process has its own generators and counts of activations.
        every = self._ranks.gather((checkpoint.random_state(network.model), network.activations.state_dict()))
        random, counted = map(list, zip(*every, strict=True))
        with self._ranks.agreeing(f"writing {os.fspath(path)!r}") as check:
            if self._ranks.rank == 0:
                content = {
                    "classes": checkpoint.classes(network.model, self._optimizer),
                    "model": network.model.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "pruner": self.state_dict(),
                    "also": [module.state_dict() for module in network.also],
                    "random": random,
                    "activations": counted,
                    "extra": extra,
                }
                checkpoint.write(path, content)
            check()

    def load_checkpoint(
        self, path: str | os.PathLike[str], *, also: Sequence[nn.Module] = ()
    ) -> dict[str, Any]:
        """Go on from :meth:`save_checkpoint`, in a full-size model with its own optimizer and Pruner.

        This restores sizes and values of all of them. Training then goes on bit by bit as if it had not been
        interrupted. Other ``steps`` than before extend it, see :meth:`load_state_dict`. The caller has to
        extend a learning rate schedule among the extra values. If several processes train together, each has
        to call this. If their number has changed, they reuse the saved generators in turn.

        Args:
            path: the file. Reading it runs no code from it.
            also: further copies of the model that are cut to its size. The file does not hold their values,
                except among the extra values.

        Returns:
            The extra values.

        Raises:
            OSError: ``path`` cannot be read.
            ValueError: the file is truncated or not a checkpoint, or belongs to another network, optimizer or
                settings, or the model is sharded.
            RuntimeError: one of these happened in another process, or the processes read different files.
                Nothing has changed after any exception. Ctrl-C waits until everything is loaded.
        """
        network = self._network
        _check_whole(network.model)
        with self._ranks.agreeing(f"reading {os.fspath(path)!r}") as check:
            content = checkpoint.read(path)
            state = content["pruner"]
            if "activations" in state:
                counted = content["activations"]
                state |= {"activations": counted[self._ranks.rank % len(counted)]}
            self._check_state(state)
            shapes = network.shapes(network.check_state(state))
            checkpoint.check(content, network.model, self._optimizer, network.also, shapes)
            check(state["step"], state["channels"].numpy())
        with all_or_nothing() as undo, self._ranks.changing(f"loading {os.fspath(path)!r}") as (ready, done):
            self._go_on_from(state, also, undo, ready)
            checkpoint.restored_by(undo, (network.model, *network.also), self._optimizer)
            network.model.load_state_dict(content["model"])
            self._optimizer.load_state_dict(checkpoint.in_own_memory(content["optimizer"]))
            for module, own in zip(network.also, content["also"], strict=True):
                module.load_state_dict(own)
            checkpoint.set_random_state(
                content["random"][self._ranks.rank % len(content["random"])], network.model
            )
            done()
        extra: dict[str, Any] = content["extra"]
        return extra

    def _settings(self) -> dict[str, Any]:
        policy = self._policy
        return {
            "keep": self._keep,
            "of": policy.of,
            "steps": self._steps,
            **self._timing,
            "select": repr(policy.select),
            "allocate": repr(policy.allocate),
            "round_to": policy.round_to,
            "floors": policy.floors.tolist(),
            "penalty": policy.penalty,
            "shrink": self._shrinks,
        }

    def _fingerprint(self) -> list[str]:
        groups = zip(self._network.graph.groups, self._network.widths.tolist(), strict=True)
        return [f"{group.name}:{width}" for group, width in groups]


def check_run(
    pruner: Resumable, state: Mapping[str, Any], weights: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> None:
    """Check that a Pruner, its model and its optimizer can load these state dicts, before any of them does.

    Raises:
        ValueError: one of them does not fit. Nothing has changed.
    """
    network = pruner._network
    pruner._check_state(state)
    shapes = network.shapes(network.check_state(state))
    checkpoint.check_training(weights, optimizer, network.model, pruner._optimizer, shapes)


def _check_whole(model: nn.Module) -> None:
    check_plain(
        "model",
        model.named_parameters(),
        "save state_dict() of model, optimizer and Pruner with torch.distributed.checkpoint where they are "
        "sharded",
    )
