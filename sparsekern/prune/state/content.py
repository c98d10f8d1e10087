"""What the content of checkpoints and of a Pruner's state has to be, as data.

Everything is checked before anything changes: first what holds for every network (:data:`CHECKPOINT`,
:data:`STATE`), then what only a given network, optimizer and schedule can tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.files.schema import (
    FLAG,
    NOTHING,
    PLAIN,
    TEXT,
    Accepted,
    Anything,
    Array,
    Either,
    Entries,
    Fields,
    Items,
    Kind,
    OneOf,
    Real,
    Row,
    Rule,
    Whole,
    like,
)
from sparsekern.kernels.rows import COUNT, GRAD_SQ, WEIGHT_SQ
from sparsekern.kernels.rows import LIVE as LIVE_ROW
from sparsekern.prune.schedule import Schedule
from sparsekern.prune.state.masking import CONDEMNED, MASKED

FORMAT = "sparsekern.checkpoint"
VERSION = 1
STATE_VERSION = 3

_TWISTER = 624  # words of the Mersenne twister


def _as_generator(value: Tensor) -> None:
    torch.Generator().set_state(value)


def numpy_state(value: Mapping[str, Any]) -> dict[str, Any]:
    """What ``numpy.random.set_state`` takes, of what a checkpoint holds."""
    key = value["state"]["key"].cpu().numpy().astype(np.uint32)
    return {**value, "state": {**value["state"], "key": key}}


def python_state(value: Any) -> tuple[Any, ...]:
    """What ``random.setstate`` takes, of what a checkpoint holds."""
    version, internal, gauss = value
    return version, tuple(internal), gauss


_WORD = Whole(0, 2**32 - 1)
GENERATORS = Fields(
    {
        "torch": Accepted(_as_generator, "state of torch's generator"),
        "cuda": Items(Array(dtype=torch.uint8, ndim=1)),
        "numpy": Fields(
            {
                "bit_generator": OneOf(("MT19937",)),
                "state": Fields(
                    {
                        "key": Array((_TWISTER,), torch.int64, low=0, high=2**32 - 1),
                        "pos": Whole(0, _TWISTER),
                    }
                ),
                "has_gauss": Whole(0, 1),
                "gauss": Real(),
            }
        ),
        "python": Row(
            [OneOf((3,)), Row([*[_WORD] * _TWISTER, Whole(0, _TWISTER)]), Either((NOTHING, Real()))]
        ),
    }
)
"""State of the generators of torch, NumPy and Python in one process."""

METADATA = Entries(
    TEXT, Fields({}, {"version": Either((NOTHING, Whole(0)))}, others=Either((FLAG, TEXT, NOTHING, Whole())))
)
"""Versions of the modules, which torch keeps beside their state."""

_VECTOR = Array(dtype=torch.float32, ndim=1)
# Means of shares may round upwards.
_SHARE: dict[str, Any] = {"low": 0.0, "high": 1.001, "nan": False}
_SIZE: dict[str, Any] = {"low": 0.0, "nan": False, "infinite": False}
_FINITE: dict[str, Any] = {"nan": False, "infinite": False}

ROW_VALUES: dict[str, dict[str, Any]] = {
    "penalty": _SIZE,
    "countdown": {"low": LIVE_ROW},
    "threshold": {"low": 0.0, "nan": False},
    "activity": _SHARE,
    "nonfinite": {"low": 0.0},
    "channel_dot": _FINITE,
    "channel_dot_sq": _SIZE,
    "updates": _SIZE,
}
"""What elements of the arrays of a :class:`~sparsekern.kernels.rows.RowTable` can be."""

COUNT_VALUES: dict[str, dict[str, Any]] = {
    "threshold": {"low": 0.0, "nan": False},
    "activity": _SHARE,
    "updates": _SIZE,
}
"""The same for :class:`~sparsekern.prune.state.activations.Activations`."""

COUNTED = Fields({"threshold": _VECTOR, "activity": _VECTOR, "updates": _VECTOR})
"""What the fused normalisations of one process have counted."""

STATE = Fields(
    {
        "version": OneOf((STATE_VERSION,)),
        "settings": Entries(TEXT, Either((PLAIN, Items(PLAIN)))),
        "schedule": Anything(),
        "network": Items(TEXT),
        "step": Whole(0),
        "next": Either((NOTHING, Whole(1))),
        "nonfinite_seen": Whole(0),
        "channels": Array(dtype=torch.int8, ndim=1),
        "rows": Kind(dict),
    },
    {"activations": COUNTED},
)
"""``Pruner.state_dict()``, of any network."""

OPTIMIZER = Fields(
    {
        "state": Entries(Either((Whole(0), TEXT)), Anything()),
        "param_groups": Items(Fields({"params": Items(Whole(0))}, others=Anything())),
    },
    others=Anything(),
)
"""``state_dict()`` of any optimizer."""

CHECKPOINT = Fields(
    {
        "format": OneOf((FORMAT,)),
        "version": OneOf((VERSION,)),
        "classes": Fields({"model": TEXT, "optimizer": TEXT}),
        "model": Entries(TEXT, Anything()),
        "optimizer": OPTIMIZER,
        "pruner": STATE,
        "also": Items(Entries(TEXT, Anything())),
        "random": Items(GENERATORS, least=1),
        "activations": Items(COUNTED, least=1),
        "extra": Entries(TEXT, Anything()),
    }
)
"""A file of ``Pruner.save_checkpoint``, of any network."""


def _number(low: float, below: float = math.inf) -> Rule:
    """A number, or a tensor that holds one."""
    return Either(
        (Real(low, below), *(Array(shape, low=low, nan=False, infinite=False) for shape in ((), (1,))))
    )


_RATE, _PART = _number(0), _number(0, 1)

HYPERPARAMETERS: dict[str, Rule] = {
    "lr": _RATE,
    "initial_lr": _RATE,
    "betas": Row([_PART, _PART]),
    "weight_decay": _RATE,
    "momentum": Real(0),
    "dampening": Real(),
    "alpha": Real(0),
    "rho": Real(0),
    "nesterov": FLAG,
    "maximize": FLAG,
    "amsgrad": FLAG,
    "centered": FLAG,
    "capturable": FLAG,
    "differentiable": FLAG,
    "decoupled_weight_decay": FLAG,
    "fused": Either((NOTHING, FLAG)),
    "foreach": Either((NOTHING, FLAG)),
}
"""Of optimizers of torch and of ours; others have to be of the kind that the optimizer has now."""

_REQUIRED = {
    "Adam": ("step", "exp_avg", "exp_avg_sq"),
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "NAdam": ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    "RAdam": ("step", "exp_avg", "exp_avg_sq"),
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "RMSprop": ("step", "square_avg"),
    "Adagrad": ("step", "sum"),
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "ASGD": ("step", "eta", "mu", "ax"),
    "Rprop": ("step", "prev", "step_size"),
    "SGD": (),
}
# Beside these, by the flag of the group that asks for them.
_BY_FLAG = {"max_exp_avg_sq": "amsgrad", "grad_avg": "centered", "momentum_buffer": "momentum"}
_SCALARS = ("step", "mu_product", "eta", "mu")
_NOT_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "step_size")


@dataclass(frozen=True)
class Sums(Array):
    """Sums over the elements of each row, of which only ``dot`` can be negative."""

    def check(self, value: Any, name: str) -> None:
        super().check(value, name)
        if bool((value[:, [COUNT, GRAD_SQ, WEIGHT_SQ]] < 0).any()):
            raise ValueError(f"{name}: got a negative count or sum of squares, expected numbers >= 0")


def rows_rule(expected: Mapping[str, Any]) -> Rule:
    """State of a table of rows, for one whose own state is ``expected``."""
    arrays = _arrays({name: own for name, own in expected.items() if isinstance(own, Tensor)}, ROW_VALUES)
    sums = Sums(tuple(expected["sums"].shape), expected["sums"].dtype, nan=False, infinite=False)
    return Fields({"tau": Real(positive=True), "decay": Real(0, 1), **arrays, "sums": sums})


def counted_rule(expected: Mapping[str, Tensor]) -> Rule:
    """What normalisations have counted, for a network whose own state is ``expected``."""
    return Fields(_arrays(expected, COUNT_VALUES))


def _arrays(expected: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]) -> dict[str, Rule]:
    return {
        name: Array(tuple(own.shape), own.dtype, **values.get(name, {})) for name, own in expected.items()
    }


def tensors_rule(model: nn.Module, shapes: Mapping[int, tuple[int, ...]]) -> Rule:
    """``state_dict()`` of a module.

    Args:
        model: the module as it is.
        shapes: by ``id`` of its tensors, the shapes that they will have; others keep theirs.
    """
    return Fields(
        {
            name: Array(shapes.get(id(own), tuple(own.shape)), own.dtype)
            if isinstance(own, Tensor)
            else Anything()
            for name, own in model.state_dict(keep_vars=True).items()
        }
    )


def optimizer_rule(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], shapes: Mapping[int, tuple[int, ...]]
) -> Rule:
    """``state_dict()`` of an optimizer, with as many groups and parameters as ``optimizer`` has now.

    State of torch's optimizers and ours is checked entry by entry. What others keep is theirs to know.

    Args:
        optimizer: as it is.
        state: what is to be checked; has to satisfy :data:`OPTIMIZER`.
        shapes: by ``id`` of a parameter, the shape that it will have.

    Raises:
        ValueError: the groups or parameters of ``state`` are others.
    """
    theirs = [len(group["params"]) for group in state["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(f"checkpoint: of an optimizer with groups of {theirs} parameters, expected {ours}")
    entries: dict[Any, Rule] = {}
    pairs = set()
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for number, param in zip(group["params"], own["params"], strict=True):
            shape = shapes.get(id(param), tuple(param.shape))
            entries[number] = _state_rule(optimizer, group, shape, param.dtype)
            pairs.add((number, id(param)))
    own_ids = {identity for _, identity in pairs}
    if not len(pairs) == len(entries) == len(own_ids):
        raise ValueError(
            f"checkpoint['optimizer']['param_groups']: got {len(entries)} different numbers in 'params', "
            f"expected one for each of {len(own_ids)} parameters"
        )
    others = None if _is_known(optimizer) else Anything()
    groups = [_group_rule(optimizer, group) for group in optimizer.param_groups]
    extra = {key: Anything() for key in optimizer.state_dict().keys() - {"state", "param_groups"}}
    return Fields({"state": Fields({}, entries, others), "param_groups": Row(groups), **extra})


def _group_rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule:
    """One group of the state: what the optimizer cannot do without, and whatever schedulers have added."""
    needed: dict[str, Rule] = {"params": Anything()}
    optional: dict[str, Rule] = {}
    for name, own in group.items():
        if name == "params":
            continue
        rule = HYPERPARAMETERS.get(name) if _is_known(optimizer) or name == "lr" else None
        # Flags of other versions of torch may be missing, and what a scheduler has added to this one.
        must = name in optimizer.defaults and not isinstance(own, bool | None)
        (needed if must else optional)[name] = rule or like(own)
    known = {name: rule for name, rule in HYPERPARAMETERS.items() if _is_known(optimizer)}
    return Fields(needed, {**known, **optional}, others=PLAIN if known else Anything())


def _state_rule(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> Rule:
    """State of one parameter."""
    if not _is_known(optimizer):
        return Anything()

    def rule(name: str) -> Rule:
        if name in _SCALARS:
            return _RATE
        return Array(shape, dtype, low=0.0 if name in _NOT_NEGATIVE else -math.inf)

    names = _REQUIRED[type(optimizer).__name__]
    must = {name: rule(name) for name in names}
    # A first step that was skipped, and SGD without momentum, leave nothing or None.
    may = {name: Either((NOTHING, rule(name))) for name in _BY_FLAG}
    if names:
        flags = {name: group.get(flag) for name, flag in _BY_FLAG.items()}
        must |= {name: rule(name) for name, on in flags.items() if type(on) in (bool, float, int) and on}
    return Fields(must, may)


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    kind = type(optimizer)
    return kind.__name__ in _REQUIRED and kind.__module__.startswith(("torch.optim.", "sparsekern.optim."))


def check_countdowns(
    channels: np.ndarray, countdowns: Tensor, channel_of: np.ndarray, is_gate: np.ndarray
) -> None:
    """The countdowns of rows are those that the states of their channels imply.

    Args:
        channels: int8 ``[C]``; states as in :mod:`sparsekern.prune.state.masking`.
        countdowns: int32 ``[R]``.
        channel_of: int64 ``[R]``; -1 for the rows of no channel.
        is_gate: bool ``[R]``.

    Raises:
        ValueError: a row is masked and its channel is not, or the other way round.
    """
    countdown = countdowns.cpu().numpy()
    state = np.append(channels, -1)[channel_of]
    declining = (state == CONDEMNED) & is_gate
    low = np.where(declining | (state == MASKED), 0, LIVE_ROW)
    high = np.where(declining, np.iinfo(np.int32).max, low)
    wrong = np.flatnonzero((countdown < low) | (countdown > high))
    if len(wrong):
        row = wrong[0]
        expected = f"{low[row]}" if low[row] == high[row] else f"at least {low[row]}"
        raise ValueError(
            f"state['rows']['countdown']: got {countdown[row]} for row {row} ({len(wrong)} rows differ), "
            f"expected {expected} by the state of its channel"
        )


def check_progress(state: Mapping[str, Any], schedule: Schedule) -> None:
    """How far the training of a state has come fits the schedule.

    Args:
        state: has to satisfy :data:`STATE`.
        schedule: of the Pruner that loads it.

    Raises:
        ValueError: the step and what comes next contradict each other, or a decline is longer than any.
    """
    step, following = state["step"], state["next"]
    event = schedule.after(step)
    longest = max(event.decline for event in schedule.events)
    condemned = bool((state["channels"] == CONDEMNED).any())
    # Fading ends later where a gradient scaler has delayed it, and between events of an extended training.
    ends = tuple(range(step + 1, step + longest + 1))
    if event is not None or step < schedule.finish:
        expected: tuple[int | None, ...] = (schedule.finish if event is None else event.step,)
        expected += ends if condemned else ()
    else:
        # An abort leaves nothing to wait for.
        expected = ends if condemned else (None, *ends)
    # A decision that has failed is due still: its step is the last one that was made.
    due = following == step and (schedule.at(step) is not None or step >= schedule.finish)
    if following not in expected and not due:
        text = " or ".join(map(str, sorted({expected[0], expected[-1]}, key=str)))
        raise ValueError(f"state['next']: got {following} at step {step}, expected {text} by the schedule")
    left = int(state["rows"]["countdown"].max()) if len(state["rows"]["countdown"]) else 0
    if left > longest:
        raise ValueError(f"state['rows']['countdown']: got {left}, expected at most {longest} steps")
