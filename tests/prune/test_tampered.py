"""Invalid content raises one ValueError that names the entry, and nothing has changed bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prune.networks import batch, train
from prune.test_checkpoint import parts
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from sparsekern import Pruner
from sparsekern.prune.save import checkpoint, generators

Run = tuple[nn.Module, Optimizer, Pruner]
Change = Callable[[Any], None]


def bits(content: Any) -> bytes:
    return pickle.dumps(
        pytree.tree_map_only(Tensor, lambda t: (str(t.dtype), list(t.shape), t.numpy().tobytes()), content)
    )


def everything(run: Run) -> list[bytes]:
    """All that a load could change: weights, optimizer, Pruner, copies, generators."""
    model, optimizer, pruner = run
    state: list[Any] = [own.state_dict() for own in (model, optimizer, pruner, *pruner._network.also)]
    return [bits(part) for part in (*state, pruner.metrics(), generators.random_state(model))]


def averaged(seed: int) -> Run:
    torch.manual_seed(seed)
    model, optimizer, first = parts(seed)
    first.detach()
    options: dict[str, Any] = {"keep": 0.3, "steps": 24, "events": 4, "shrink": True, "round_to": 2}
    return model, optimizer, Pruner(model, optimizer, batch(0), also=[AveragedModel(model)], **options)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = averaged(0)
    train(*run[:2], range(9))
    path = tmp_path_factory.mktemp("tampered") / "checkpoint.pt"
    run[2].save_checkpoint(path, epoch=3)
    return checkpoint.read(path)


@pytest.fixture(scope="module")
def loading() -> Run:
    return averaged(1)


def put(*keys: Any, value: Any) -> Change:
    """Set the entry at ``keys`` to a value, or to the result of a function of the old value."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value(content[keys[-1]]) if callable(value) else value

    return change


def drop(*keys: Any) -> Change:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def first_is(value: float) -> Callable[[Tensor], Tensor]:
    """The same tensor with another first element."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[0] = value
        return changed

    return change


def unmasked(content: Any) -> None:
    """A masked row that counts as live."""
    countdown = content["rows"]["countdown"]
    countdown[(countdown != -1).nonzero()[0]] = -1


def versions(content: Any) -> None:
    content["model"]._metadata = OrderedDict({"stem.1": {"version": "new"}})


def itself(content: Any) -> None:
    content["optimizer"]["param_groups"][0]["betas"] = [content["optimizer"]["param_groups"][0]]


GROUP, STATE = ("optimizer", "param_groups", 0), ("optimizer", "state", 3)
RANDOM, ROWS = ("random", 0), ("rows",)
NAN, INF = float("nan"), float("inf")

# The change, and the name that the message must contain.
TAMPERED: dict[str, tuple[Change, str]] = {
    # The file's own entries.
    "random: empty": (put("random", value=[]), "'random'"),
    "random: a dict": (put("random", value={}), "'random'"),
    "random: None in it": (put("random", 0, value=None), "'random'][0]"),
    "activations: empty": (put("activations", value=[]), "'activations'"),
    "activations: a number": (put("activations", 0, "updates", value=3), "'updates'"),
    "classes: a list": (put("classes", value=["Plain", "AdamW"]), "'classes'"),
    "classes: numbers": (put("classes", "model", value=3), "'model'"),
    "extra: a list": (put("extra", value=[1]), "'extra'"),
    "extra: a number for a name": (put("extra", value={3: 1}), "'extra'"),
    "also: a dict": (put("also", value={}), "'also'"),
    "also: one too few": (put("also", value=[]), "copies"),
    "also: another shape": (put("also", 0, "module.bare.bias", value=torch.zeros(3)), "bare.bias"),
    "also: lacks a tensor": (drop("also", 0, "module.bare.bias"), "bare.bias"),
    "also: n_averaged is a number": (put("also", 0, "n_averaged", value=3), "n_averaged"),
    "an unknown entry": (put("surprise", value=1), "surprise"),
    "pruner: a list": (put("pruner", value=[]), "'pruner'"),
    "pruner: missing": (drop("pruner"), "'pruner'"),
    # Weights.
    "model: a list": (put("model", value=[]), "'model'"),
    "model: another shape": (put("model", "bare.bias", value=torch.zeros(5)), "bare.bias"),
    "model: another dtype": (put("model", "bare.bias", value=Tensor.double), "bare.bias"),
    "model: a list of numbers": (put("model", "bare.bias", value=Tensor.tolist), "bare.bias"),
    "model: sparse": (put("model", "head.weight", value=Tensor.to_sparse), "head.weight"),
    "model: one tensor more": (put("model", "more", value=torch.zeros(1)), "more"),
    "model: one tensor less": (drop("model", "head.bias"), "head.bias"),
    "model: versions": (versions, "_metadata"),
    # The optimizer.
    "optimizer: a list": (put("optimizer", value=[]), "'optimizer'"),
    "optimizer: an entry more": (put("optimizer", "more", value=1), "more"),
    "state: a list": (put("optimizer", "state", value=[]), "'state'"),
    "state: of no parameter": (put("optimizer", "state", 99, value={}), "99"),
    "state: under a text": (put("optimizer", "state", "3", value={}), "'3'"),
    "state: a tensor": (put(*STATE, value=torch.zeros(3)), "'state'][3]"),
    "state: lacks exp_avg": (drop(*STATE, "exp_avg"), "exp_avg"),
    "state: an entry more": (put(*STATE, "more", value=torch.zeros(3)), "more"),
    "state: another shape": (put(*STATE, "exp_avg", value=torch.zeros(3)), "exp_avg"),
    "state: another dtype": (put(*STATE, "exp_avg", value=Tensor.double), "exp_avg"),
    "state: a number": (put(*STATE, "exp_avg", value=0.5), "exp_avg"),
    "state: negative squares": (put(*STATE, "exp_avg_sq", value=first_is(-1)), "exp_avg_sq"),
    "state: step is a text": (put(*STATE, "step", value="9"), "step"),
    "state: step is NaN": (put(*STATE, "step", value=torch.tensor(NAN)), "step"),
    "state: step is negative": (put(*STATE, "step", value=torch.tensor(-1.0)), "step"),
    "groups: a dict": (put("optimizer", "param_groups", value={}), "param_groups"),
    "groups: none": (put("optimizer", "param_groups", value=[]), "groups"),
    "groups: a list in it": (put(*GROUP, value=[]), "param_groups'][0]"),
    "params: a text": (put(*GROUP, "params", value="0123456789"), "'params'"),
    "params: one twice": (put(*GROUP, "params", 1, value=0), "'params'"),
    "params: a float": (put(*GROUP, "params", 1, value=1.0), "'params'"),
    "lr: a text": (put(*GROUP, "lr", value="x"), "'lr'"),
    "lr: missing": (drop(*GROUP, "lr"), "'lr'"),
    "lr: None": (put(*GROUP, "lr", value=None), "'lr'"),
    "lr: True": (put(*GROUP, "lr", value=True), "'lr'"),
    "lr: NaN": (put(*GROUP, "lr", value=NAN), "'lr'"),
    "lr: negative": (put(*GROUP, "lr", value=-1e-3), "'lr'"),
    "lr: two": (put(*GROUP, "lr", value=torch.ones(2)), "'lr'"),
    "betas: one": (put(*GROUP, "betas", value=(0.9,)), "'betas'"),
    "betas: 1": (put(*GROUP, "betas", value=(0.9, 1.0)), "'betas'"),
    "betas: a number": (put(*GROUP, "betas", value=0.9), "'betas'"),
    "betas: the group itself": (itself, "'betas'"),
    "eps: a list": (put(*GROUP, "eps", value=[1e-8]), "'eps'"),
    "weight_decay: infinite": (put(*GROUP, "weight_decay", value=INF), "weight_decay"),
    "amsgrad: a text": (put(*GROUP, "amsgrad", value="no"), "amsgrad"),
    "amsgrad: without its state": (put(*GROUP, "amsgrad", value=True), "max_exp_avg_sq"),
    "foreach: a number": (put(*GROUP, "foreach", value=3), "foreach"),
    "group: an entry that is a dict": (put(*GROUP, "more", value={}), "more"),
    # Generators.
    "torch: too short": (put(*RANDOM, "torch", value=lambda t: t[:-1]), "'torch'"),
    "torch: another dtype": (put(*RANDOM, "torch", value=Tensor.int), "'torch'"),
    "torch: a list": (put(*RANDOM, "torch", value=Tensor.tolist), "'torch'"),
    "cuda: None": (put(*RANDOM, "cuda", value=None), "'cuda'"),
    "cuda: numbers": (put(*RANDOM, "cuda", value=[1]), "'cuda'"),
    "numpy: another generator": (put(*RANDOM, "numpy", "bit_generator", value="PCG64"), "bit_generator"),
    "numpy: too short": (put(*RANDOM, "numpy", "state", "key", value=lambda t: t[:-1]), "key"),
    "numpy: a negative word": (put(*RANDOM, "numpy", "state", "key", value=first_is(-1)), "key"),
    "numpy: beyond its end": (put(*RANDOM, "numpy", "state", "pos", value=10**6), "pos"),
    "python: version": (put(*RANDOM, "python", value=lambda v: (9, *v[1:])), "'python'"),
    "python: too short": (put(*RANDOM, "python", value=lambda v: (v[0], v[1][1:], v[2])), "'python'"),
    "python: a text": (put(*RANDOM, "python", value="(3, (), None)"), "'python'"),
    "python: missing": (drop(*RANDOM, "python"), "'python'"),
}

# The same for the result of Pruner.state_dict(), by itself and in a checkpoint.
STATES: dict[str, tuple[Change, str]] = {
    "version: 1": (put("version", value=1), "version"),
    "step: -1": (put("step", value=-1), "'step'"),
    "step: a float": (put("step", value=9.0), "'step'"),
    "step: True": (put("step", value=True), "'step'"),
    "step: beyond what comes next": (put("step", value=12), "'next'"),
    "step: beyond the schedule": (put("step", value=10**6), "'next'"),
    "step: before the last event": (put("step", value=4), "'next'"),
    "next: None": (put("next", value=None), "'next'"),
    "next: another": (put("next", value=13), "'next'"),
    "next: a text": (put("next", value="11"), "'next'"),
    "nonfinite_seen: -1": (put("nonfinite_seen", value=-1), "nonfinite_seen"),
    "network: a dict": (put("network", value={}), "network"),
    "network: numbers": (put("network", 0, value=16), "network"),
    "settings: a list": (put("settings", value=[]), "settings"),
    "settings: a tensor": (put("settings", "keep", value=torch.ones(2)), "keep"),
    "settings: missing": (drop("settings", "keep"), "keep"),
    "pruner: an entry more": (put("more", value=1), "more"),
    "channels: a list": (put("channels", value=Tensor.tolist), "channels"),
    "channels: another dtype": (put("channels", value=Tensor.long), "channels"),
    "channels: too few": (put("channels", value=lambda t: t[1:]), "channels"),
    "channels: no state": (put("channels", value=first_is(9)), "channels"),
    "rows: a list": (put(*ROWS, value=[]), "'rows'"),
    "rows: lacks an array": (drop(*ROWS, "activity"), "activity"),
    "rows: an array more": (put(*ROWS, "more", value=torch.zeros(1)), "more"),
    "decay: 7": (put(*ROWS, "decay", value=7), "decay"),
    "decay: a text": (put(*ROWS, "decay", value="0.9"), "decay"),
    "tau: 0": (put(*ROWS, "tau", value=0), "tau"),
    "tau: NaN": (put(*ROWS, "tau", value=NAN), "tau"),
    "countdown: -2": (put(*ROWS, "countdown", value=first_is(-2)), "countdown"),
    "countdown: without end": (put(*ROWS, "countdown", value=first_is(10**9)), "countdown"),
    "countdown: a live row is masked": (put(*ROWS, "countdown", value=first_is(0)), "countdown"),
    "countdown: a masked row is live": (unmasked, "countdown"),
    "countdown: another dtype": (put(*ROWS, "countdown", value=Tensor.long), "countdown"),
    "sums: NaN": (put(*ROWS, "sums", value=first_is(NAN)), "sums"),
    "sums: a negative count": (put(*ROWS, "sums", value=first_is(-1)), "sums"),
    "threshold: NaN": (put(*ROWS, "threshold", value=first_is(NAN)), "threshold"),
    "activity: a share of 2": (put(*ROWS, "activity", value=first_is(2)), "activity"),
    "channel_dot: infinite": (put(*ROWS, "channel_dot", value=first_is(INF)), "channel_dot"),
    "channel_dot_sq: negative": (put(*ROWS, "channel_dot_sq", value=first_is(-1)), "channel_dot_sq"),
    "updates: negative": (put(*ROWS, "updates", value=torch.tensor(-1.0)), "updates"),
    "penalty: negative": (put(*ROWS, "penalty", value=first_is(-1)), "penalty"),
    "gates: of another model": (put(*ROWS, "gate_rows", value=first_is(1)), "gate_rows"),
}


def inside(change: Change) -> Change:
    return lambda content: change(content["pruner"])


TAMPERED |= {f"pruner: {name}": (inside(change), entry) for name, (change, entry) in STATES.items()}


@pytest.mark.parametrize(("change", "entry"), TAMPERED.values(), ids=TAMPERED)
def test_a_checkpoint_is_refused(
    change: Change, entry: str, content: dict[str, Any], loading: Run, tmp_path: Path
) -> None:
    tampered = copy.deepcopy(content)
    change(tampered)
    torch.save(tampered, tmp_path / "checkpoint.pt")
    before = everything(loading)
    with pytest.raises(ValueError) as caught:
        loading[2].load_checkpoint(tmp_path / "checkpoint.pt")
    assert type(caught.value) is ValueError
    assert entry in str(caught.value), caught.value
    assert everything(loading) == before


@pytest.mark.parametrize(("change", "entry"), STATES.values(), ids=STATES)
def test_a_state_is_refused(change: Change, entry: str, content: dict[str, Any], loading: Run) -> None:
    tampered = copy.deepcopy(content["pruner"])
    change(tampered)
    before = everything(loading)
    with pytest.raises(ValueError) as caught:
        loading[2].load_state_dict(tampered)
    assert type(caught.value) is ValueError
    assert entry in str(caught.value), caught.value
    assert everything(loading) == before


@pytest.mark.parametrize("state", [None, [], "state", {}, torch.ones(2)], ids=repr)
def test_what_is_no_state_is_refused(state: Any, loading: Run) -> None:
    with pytest.raises(ValueError, match="^state: "):
        loading[2].load_state_dict(state)


def test_the_same_content_unchanged_is_loaded(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    run = averaged(2)
    assert run[2].load_checkpoint(tmp_path / "checkpoint.pt") == {"epoch": 3}
    for name, value in content["model"].items():
        assert torch.equal(run[0].state_dict()[name], value)
