"""Random sequences of user actions on a model, its optimizer and its Pruner, in any order.

After each action masked rows are exactly zero, or the Pruner's next check raises an error that says so. At
the end the masked and the compact network give equal outputs. ``SPARSEKERN_SEQUENCES=2000`` makes 2000
sequences for each optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from prune.action_networks import NETWORKS, OPTIMIZERS, made
from prune.networks import batch
from prune.test_written import revived
from torch import Tensor, nn

import sparsekern
from sparsekern import Pruner
from sparsekern.graph import ChannelGraph
from sparsekern.prune import prunable
from sparsekern.prune import pruner as pruner_module
from sparsekern.prune.state.masking import MASKED

SEQUENCES = int(os.environ.get("SPARSEKERN_SEQUENCES", "0"))
STEPS = 8
DOUBLE = torch.float64

seeds = st.integers(0, 9)
layers = st.integers(0, 30)


_graphs: dict[Any, ChannelGraph] = {}


def _known_graph(model: nn.Module, *arguments: Any) -> ChannelGraph:
    """Networks of the same shapes share one graph, because tracing takes most of a sequence's time."""
    shapes = tuple((n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters())
    key = type(model), shapes
    if key not in _graphs:
        _graphs[key] = prunable.prunable_graph(model, *arguments)
    return _graphs[key]


class Actions(RuleBasedStateMachine):
    """One training; a rule is one action of its user."""

    make: str

    @initialize(
        network=st.sampled_from(sorted(NETWORKS)),
        shrinks=st.booleans(),
        keep=st.sampled_from([0.3, 0.6]),
        steps=st.sampled_from([0, 3, STEPS, STEPS, STEPS]),
    )
    def begin(self, network: str, shrinks: bool, keep: float, steps: int) -> None:
        self.network, self.shrinks, self.keep = network, shrinks, keep
        self.model = made(network, 0)
        self.optimizer = OPTIMIZERS[self.make](self.model.parameters())
        self.pruner = self._pruner(self.model, self.optimizer)
        self.batches = 0
        self.saved: list[dict[str, Any]] = []
        self.folder = tempfile.TemporaryDirectory()
        for _ in range(steps):
            self._backward()
            self._step()

    def _pruner(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Pruner:
        options = {
            "keep": self.keep,
            "steps": STEPS,
            "events": 2,
            "warmup": 0.1,
            "finish": 0.7,
            "round_to": 1,
        }
        with patch.object(pruner_module, "prunable_graph", _known_graph):
            return Pruner(model, optimizer, batch(0, dtype=DOUBLE), shrink=self.shrinks, **options)

    # Training.

    def _backward(self, scale: float = 1.0) -> None:
        self.batches += 1
        (self.model(batch(self.batches % 7, images=2, dtype=DOUBLE)).square().mean() * scale).backward()

    def _step(self) -> None:
        """A step; written masked rows raise an error at an event, and ``remask`` then zeroes them."""
        try:
            self.optimizer.step()
        except RuntimeError as error:
            assert "remask" in str(error), error
            assert revived(self.model, self.pruner) or not self._finite()
            self.pruner.remask()
        self.optimizer.zero_grad()

    @rule(count=st.integers(1, 4), accumulated=st.booleans())
    def train(self, count: int, accumulated: bool) -> None:
        self.model.train()
        for _ in range(count):
            self._backward()
            if accumulated:
                self._backward(0.5)
            self._step()
        self.check()

    @rule(kind=st.sampled_from(["no gradients", "some gradients", "lr 0", "evaluation mode"]))
    def step_otherwise(self, kind: str) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if kind != "no gradients":
            self.model.train(kind != "evaluation mode")
            self._backward()
        if kind == "some gradients":
            for param in list(self.model.parameters())[::2]:
                param.grad = None
        if kind == "lr 0":
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        self._step()
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        self.check()

    @rule(overflows=st.booleans())
    def scaled_step(self, overflows: bool) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        self.batches += 1
        loss = self.model(batch(self.batches % 7, images=2, dtype=DOUBLE)).square().mean()
        scaler.scale(loss * (torch.inf if overflows else 1)).backward()
        with contextlib.suppress(RuntimeError):
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()
        self._mend()
        self.check()

    # Loads.

    @rule()
    def remember(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.saved.append(copy.deepcopy(state | {"pruner": self.pruner.state_dict()}))

    @rule(which=seeds, what=st.sampled_from(["model", "optimizer", "pruner", "everything"]))
    @precondition(lambda self: self.saved)
    def load_earlier(self, which: int, what: str) -> None:
        state = self.saved[which % len(self.saved)]
        objects = {"model": self.model, "optimizer": self.optimizer, "pruner": self.pruner}
        shapes = {name: value.shape for name, value in self.model.state_dict().items()}
        same = shapes == {name: value.shape for name, value in state["model"].items()}
        for name in ("pruner", "model", "optimizer"):
            # Torch loads the state of a larger model, and the next step refuses it.
            if what in (name, "everything") and (same or name != "optimizer"):
                # The state of a larger model, or of one with other groups, does not fit.
                with contextlib.suppress(ValueError, RuntimeError, KeyError):
                    objects[name].load_state_dict(copy.deepcopy(state[name]))
        self._mend_optimizer()
        self.check(loaded=True)

    @rule(seed=seeds, part=st.booleans())
    def load_dense(self, seed: int, part: bool) -> None:
        state = made(self.network, seed).state_dict()
        if part:
            state = dict(list(state.items())[seed % 5 :: 2])
        with contextlib.suppress(RuntimeError):
            self.model.load_state_dict(state, strict=not part)
        self.check(loaded=True)

    @rule(at=layers)
    def load_layer(self, at: int) -> None:
        modules = [m for m in self.model.modules() if list(m.parameters(recurse=False))]
        module = modules[at % len(modules)]
        module.load_state_dict(
            {name: torch.randn_like(p) for name, p in module.named_parameters()}, strict=False
        )
        self.check(loaded=True)

    # Writes that the Pruner is not told about.

    @rule(at=layers, how=st.sampled_from(["data", "copy_", "init", "add_", "data.fill_"]))
    def write(self, at: int, how: str) -> None:
        params = list(self.model.parameters())
        param = params[at % len(params)]
        values = torch.rand_like(param) + 0.5
        with torch.no_grad():
            if how == "data":
                param.data = values
            elif how == "copy_":
                param.copy_(values)
            elif how == "init":
                nn.init.normal_(param)
            elif how == "add_":
                param.add_(0.1)
            else:
                param.data.fill_(0.3)
        self.check()

    @rule(seed=seeds)
    def average(self, seed: int) -> None:
        """Copy slow weights back, from a network without masks."""
        other = dict(made(self.network, seed).named_parameters())
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                if other[name].shape == param.shape:
                    param.lerp_(other[name], 0.5)
        self.check()

    @rule(
        how=st.sampled_from(["half and back", "float and back", "channels last", "contiguous", "same device"])
    )
    def move(self, how: str) -> None:
        if how == "half and back":
            self.model.half().double()
        elif how == "float and back":
            self.model.float().double()
        elif how == "same device":
            self.model.to("cpu")
        else:
            memory = torch.channels_last if how == "channels last" else torch.contiguous_format
            self.model.to(memory_format=memory)
        self.check(loaded=True)

    @rule(at=layers, trained=st.booleans())
    def freeze(self, at: int, trained: bool) -> None:
        params = list(self.model.parameters())
        params[at % len(params)].requires_grad_(trained or at % len(params) == 0)
        self.check()

    @rule(at=layers)
    def regroup(self, at: int) -> None:
        """Move a parameter to a new parameter group."""
        groups = self.optimizer.param_groups
        group = max(groups, key=lambda group: len(group["params"]))
        if len(group["params"]) > 1:
            param = group["params"].pop(at % len(group["params"]))
            self.optimizer.add_param_group({"params": [param], "lr": 0.01})
        self.check()

    # The Pruner.

    @rule(really=st.sampled_from([True, False, False]))
    def shrink(self, really: bool) -> None:
        """Shrink; rarely, because afterwards nothing is masked."""
        if really or self.shrinks:
            self._looks(self.pruner.shrink)
        self.check()

    @rule(keep=st.sampled_from([None, 0.5, 0.9]))
    def plan(self, keep: float | None) -> None:
        with contextlib.suppress(ValueError):  # a budget below what is left
            self._looks(lambda: self.pruner.plan(keep))
        self.check()

    @rule()
    def abort(self) -> None:
        self.pruner.abort()
        self.check()

    @rule()
    def remask(self) -> None:
        self.pruner.remask()
        self.check(loaded=True)

    @rule()
    def begin_anew(self) -> None:
        """Make another Pruner for the current model."""
        self.pruner.detach()
        for param in self.model.parameters():
            param.requires_grad_(True)
        try:
            self.pruner = self._pruner(self.model, self.optimizer)
        except ValueError as error:
            assert "keep" in str(error) or "channel" in str(error), error
            self.begin(self.network, self.shrinks, self.keep, STEPS)
        self.check()

    @rule()
    def go_on_from_a_checkpoint(self) -> None:
        """Load a checkpoint into fresh objects, as another process would."""
        path = Path(self.folder.name, "checkpoint.pt")
        self._looks(lambda: self.pruner.save_checkpoint(path))
        model = made(self.network, 3)
        optimizer = OPTIMIZERS[self.make](model.parameters())
        pruner = self._pruner(model, optimizer)
        try:
            pruner.load_checkpoint(path)
        except ValueError:
            return  # the parameter groups or the network have changed
        self.pruner.detach()
        self.model, self.optimizer, self.pruner = model, optimizer, pruner
        self.check(loaded=True)

    @rule(pickled=st.booleans())
    def copy_the_model(self, pickled: bool) -> None:
        twin = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)
        x = batch(5, dtype=DOUBLE)
        with torch.no_grad():
            assert torch.equal(twin.eval()(x), self.model.eval()(x))
        twin.load_state_dict({name: torch.ones_like(v) for name, v in twin.state_dict().items()})
        assert all(bool((p == 1).all()) for p in twin.parameters())
        self.check()

    # Invariants.

    def _looks(self, action: Any) -> None:
        """Run an action that must raise an error if masked rows are not zero."""
        wrong = revived(self.model, self.pruner) or not self._finite()
        try:
            action()
        except RuntimeError as error:
            assert "remask" in str(error) and wrong, error
            self.pruner.remask()
            action()
        else:
            assert not wrong

    def _mend(self) -> None:
        if revived(self.model, self.pruner) or not self._finite():
            with pytest.raises(RuntimeError, match="remask"):
                self.pruner.compact()
            self.pruner.remask()

    def check(self, loaded: bool = False) -> None:
        """Masked rows are zero, or the Pruner raises an error; after loads they are always zero."""
        if loaded:
            assert not revived(self.model, self.pruner)
        self._mend()
        assert not revived(self.model, self.pruner)
        self._check_state()

    def _check_state(self) -> None:
        """The optimizer's state of masked rows is zero; otherwise it would move them."""
        parameters = dict(self.model.named_parameters())
        for name, slots in self.pruner.graph.tensors.items():
            if slots.kind != "parameter" or slots.row_dim is None:
                continue
            channels = slots.channels[slots.row_dim]
            if channels is None:
                continue
            gone = torch.from_numpy((channels >= 0) & (self.pruner._network.masks.state[channels] == MASKED))
            param = parameters[name]
            for value in self.optimizer.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    rows = value.movedim(slots.row_dim, 0)[gone]
                    assert not rows.any(), f"{name}: masked rows have state"

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(v).all()) for v in self.model.state_dict().values())

    def _mend_optimizer(self) -> None:
        """Replace learning rates of 0, which the state of a training with other groups may leave."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] or 0.01

    def teardown(self) -> None:
        if not hasattr(self, "pruner"):
            return
        self.check()
        if self._finite():
            small = self.pruner.compact()
            assert sparsekern.verify(self.model, small, batch(99, dtype=DOUBLE)) < 1e-12
        self.pruner.detach()
        self.folder.cleanup()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", OPTIMIZERS if SEQUENCES else [m for m in OPTIMIZERS if m != "torch.AdamW"])
def test_masked_rows_stay_zero_or_are_an_error(make: str) -> None:
    machine = type("Actions", (Actions,), {"make": make})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=SEQUENCES or 25,
            stateful_step_count=12,
            derandomize=not SEQUENCES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
