"""Rules for the content of checkpoints and of a Pruner's state, as data.

All checks run before anything changes. The rules of every network (:data:`CHECKPOINT`, :data:`STATE`) come
first, then the rules for a given network, optimizer and schedule.
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
from sparsekern.prune.state.masking import FADING, MASKED

FORMAT = "sparsekern.checkpoint"
VERSION = 1
STATE_VERSION = 3

_TWISTER = 624  # words of the Mersenne twister


def _as_generator(value: Tensor) -> None:
    torch.Generator().set_state(value)


def numpy_state(value: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the NumPy generator's state in a checkpoint to the argument of ``numpy.random.set_state``."""
    key = value["state"]["key"].cpu().numpy().astype(np.uint32)
    return {**value, "state": {**value["state"], "key": key}}


def python_state(value: Any) -> tuple[Any, ...]:
    """Convert the Python generator's state in a checkpoint to the argument of ``random.setstate``."""
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
"""Versions of the modules, which torch stores with a ``state_dict``."""

_VECTOR = Array(dtype=torch.float32, ndim=1)
# Rounding may lift a mean of shares above 1.
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
"""Allowed elements of the arrays of a :class:`~sparsekern.kernels.rows.RowTable`."""

COUNT_VALUES: dict[str, dict[str, Any]] = {
    "threshold": {"low": 0.0, "nan": False},
    "activity": _SHARE,
    "updates": _SIZE,
}
"""Allowed elements of the arrays of :class:`~sparsekern.prune.state.activations.Activations`."""

COUNTED = Fields({"threshold": _VECTOR, "activity": _VECTOR, "updates": _VECTOR})
"""Counts of the fused normalisations of one process."""

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
"""``Pruner.state_dict()`` of any network."""

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
"""A file of ``Pruner.save_checkpoint`` of any network."""


def _number(low: float, below: float = math.inf) -> Rule:
    """A number in ``[low, below)``, or a tensor with one such element."""
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
"""For optimizers of torch and sparsekern; others must keep the types of their current values."""

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
# Further state, by the hyperparameter of the group that requires it.
_BY_FLAG = {"max_exp_avg_sq": "amsgrad", "grad_avg": "centered", "momentum_buffer": "momentum"}
_SCALARS = ("step", "mu_product", "eta", "mu")
_NOT_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "exp_inf", "step_size")


@dataclass(frozen=True)
class Sums(Array):
    """Sums over the elements of each row; only ``dot`` can be negative."""

    def check(self, value: Any, name: str) -> None:
        super().check(value, name)
        if bool((value[:, [COUNT, GRAD_SQ, WEIGHT_SQ]] < 0).any()):
            raise ValueError(f"{name}: got a negative count or sum of squares, expected numbers >= 0")


def rows_rule(expected: Mapping[str, Any]) -> Rule:
    """The rule for the state of a table of rows with the shapes and dtypes of ``expected``."""
    arrays = _arrays({name: own for name, own in expected.items() if isinstance(own, Tensor)}, ROW_VALUES)
    sums = Sums(tuple(expected["sums"].shape), expected["sums"].dtype, nan=False, infinite=False)
    return Fields({"tau": Real(positive=True), "decay": Real(0, 1), **arrays, "sums": sums})


def counted_rule(expected: Mapping[str, Tensor]) -> Rule:
    """The rule for counts of normalisations with the shapes and dtypes of ``expected``."""
    return Fields(_arrays(expected, COUNT_VALUES))


def _arrays(expected: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]]) -> dict[str, Rule]:
    return {
        name: Array(tuple(own.shape), own.dtype, **values.get(name, {})) for name, own in expected.items()
    }


def tensors_rule(model: nn.Module, shapes: Mapping[int, tuple[int, ...]]) -> Rule:
    """The rule for ``state_dict()`` of a module.

    Args:
        model: the module as it is now.
        shapes: future shapes by ``id`` of the module's tensors; the other tensors keep theirs.
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
    """The rule for ``state_dict()`` of an optimizer, with as many groups and parameters as it has now.

    The rule covers every entry of the state of torch's and sparsekern's optimizers. Other optimizers may have
    any state.

    Args:
        optimizer: the optimizer as it is now.
        state: the state to check; it has to satisfy :data:`OPTIMIZER`.
        shapes: future shapes by ``id`` of the parameters.

    Raises:
        ValueError: ``state`` has other groups or parameters.
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
    """The rule for one group of the state: required hyperparameters, and entries added by schedulers."""
    needed: dict[str, Rule] = {"params": Anything()}
    optional: dict[str, Rule] = {}
    for name, own in group.items():
        if name == "params":
            continue
        rule = HYPERPARAMETERS.get(name) if _is_known(optimizer) or name == "lr" else None
        # Flags of other versions of torch and entries added by a scheduler may be missing.
        must = name in optimizer.defaults and not isinstance(own, bool | None)
        (needed if must else optional)[name] = rule or like(own)
    known = {name: rule for name, rule in HYPERPARAMETERS.items() if _is_known(optimizer)}
    return Fields(needed, {**known, **optional}, others=PLAIN if known else Anything())


def _state_rule(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> Rule:
    """The rule for the state of one parameter."""
    if not _is_known(optimizer):
        return Anything()

    def rule(name: str) -> Rule:
        if name in _SCALARS:
            return _RATE
        return Array(shape, dtype, low=0.0 if name in _NOT_NEGATIVE else -math.inf)

    names = _REQUIRED[type(optimizer).__name__]
    must = {name: rule(name) for name in names}
    # After a skipped first step, and for SGD without momentum, an entry is missing or None.
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
    """Check that the countdowns of rows agree with the states of their channels.

    Args:
        channels: int8 ``[C]``; states as in :mod:`sparsekern.prune.state.masking`.
        countdowns: int32 ``[R]``.
        channel_of: int64 ``[R]``; -1 for the rows of no channel.
        is_gate: bool ``[R]``.

    Raises:
        ValueError: the countdown of a row does not fit the state of its channel.
    """
    countdown = countdowns.cpu().numpy()
    state = np.append(channels, -1)[channel_of]
    declining = (state == FADING) & is_gate
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
    """Check that the progress of a state fits the schedule.

    Args:
        state: the state; it has to satisfy :data:`STATE`.
        schedule: the schedule that the state was saved with.

    Raises:
        ValueError: ``next`` does not fit the step, or a countdown is longer than all of the schedule.
    """
    step, following = state["step"], state["next"]
    event = schedule.after(step)
    longest = max(event.fade_steps for event in schedule.events)
    fading = bool((state["channels"] == FADING).any())
    # Skipped steps delay the end of fading; in an extended training it may fall between events.
    ends = tuple(range(step + 1, step + longest + 1))
    if event is not None or step < schedule.finish:
        expected: tuple[int | None, ...] = (schedule.finish if event is None else event.step,)
        expected += ends if fading else ()
    else:
        # An abort leaves nothing to wait for.
        expected = ends if fading else (None, *ends)
    # A failed decision is still due at the latest step.
    due = following == step and (schedule.at(step) is not None or step >= schedule.finish)
    if following not in expected and not due:
        text = " or ".join(map(str, sorted({expected[0], expected[-1]}, key=str)))
        raise ValueError(f"state['next']: got {following} at step {step}, expected {text} by the schedule")
    left = int(state["rows"]["countdown"].max()) if len(state["rows"]["countdown"]) else 0
    if left > longest:
        raise ValueError(f"state['rows']['countdown']: got {left}, expected at most {longest} steps")
