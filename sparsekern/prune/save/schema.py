"""Rules for the form of a checkpoint, as data.

All checks run before anything changes. The rules of every network (:data:`CHECKPOINT`) come first, then the
rules for a given model and optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.files.schema import (
    FLAG,
    NOTHING,
    PLAIN,
    TEXT,
    Anything,
    Array,
    Either,
    Entries,
    Fields,
    Items,
    OneOf,
    Real,
    Row,
    Rule,
    Whole,
    like,
)
from sparsekern.prune.save.generators import GENERATORS
from sparsekern.prune.state.future import Future
from sparsekern.prune.state.schema import COUNTED, STATE

FORMAT = "sparsekern.checkpoint"
VERSION = 1

METADATA = Entries(
    TEXT, Fields({}, {"version": Either((NOTHING, Whole(0)))}, others=Either((FLAG, TEXT, NOTHING, Whole())))
)
"""Versions of the modules, which torch stores with a ``state_dict``."""

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


def tensors_rule(model: nn.Module, future: Future) -> Rule:
    """The rule for ``state_dict()`` of a module.

    Args:
        model: the module as it is now.
        future: the module's tensors after the load.
    """
    return Fields(
        {
            name: Array(future.shape(own), own.dtype) if isinstance(own, Tensor) else Anything()
            for name, own in future.entries(model).items()
        }
    )


def optimizer_rule(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], future: Future) -> Rule:
    """The rule for ``state_dict()`` of an optimizer, with as many groups and parameters as it has now.

    The rule covers every entry of the state of torch's and sparsekern's optimizers. Other optimizers may have
    any state.

    Args:
        optimizer: the optimizer as it is now.
        state: the state to check; it has to satisfy :data:`OPTIMIZER`.
        future: the parameters after the load.

    Raises:
        ValueError: ``state`` has other groups or parameters.
    """
    theirs = [len(group["params"]) for group in state["param_groups"]]
    left = [[p for p in group["params"] if id(p) not in future.gone] for group in optimizer.param_groups]
    ours = [len(params) for params in left]
    if theirs != ours:
        raise ValueError(
            f"checkpoint['optimizer']: got groups of {theirs} parameters, expected {ours}; make the "
            f"optimizer with the same groups as the saved one"
        )
    entries: dict[Any, Rule] = {}
    pairs = set()
    for group, own in zip(state["param_groups"], left, strict=True):
        for number, param in zip(group["params"], own, strict=True):
            entries[number] = _state_rule(optimizer, group, future.shape(param), param.dtype)
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
