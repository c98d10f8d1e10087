"""The ops that problems are solved with: each in every setting of its options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.options import NAMES, OPTIONS, Scaling
from sparsekern.kernels.rows import Rows
from sparsekern.kernels.selfcheck.problems import Problem


@dataclass(frozen=True)
class Op:
    """One op with the lists that it takes and one setting of its options.

    Attributes:
        name: name of the op.
        lists: names of the lists of a :class:`Problem` that it takes; empty for a list that it does not use.
        options: fields of its options, and ``grad_scale`` and ``found_inf``.
    """

    name: str
    lists: tuple[str, ...]
    options: dict[str, Any]

    def call(self, backend: Any, on: Problem) -> None:
        """Run the op of ``backend`` over the tensors of ``on``."""
        lists = (on.list(name) if name else [] for name in self.lists)
        run_op(backend, self.name, *lists, **self.options, rows=on.rows)

    def on(self, device: torch.device) -> Op:
        """The op with the tensors of its options on ``device``."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, options=moved)


def run_op(backend: Any, name: str, *lists: Any, rows: Rows | None, **values: Any) -> None:
    """One op of a backend, or of the module of the front functions.

    Args:
        backend: has the function ``step_``.
        name: name of the op.
        lists: its lists.
        rows: the rows.
        values: the fields of its options, and ``grad_scale`` and ``found_inf``.
    """
    op = NAMES.index(name)
    scaling = Scaling(values.pop("grad_scale", None), values.pop("found_inf", None))
    backend.step_(op, lists, OPTIONS[op](**values), rows, scaling)


SGD = dict(
    lr=0.05,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    first=False,
    grad_scale=None,
    found_inf=None,
)
ADAM = dict(
    lr=0.01,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    amsgrad=False,
    maximize=False,
    grad_scale=None,
    found_inf=None,
)


def _sgd(**options: Any) -> Op:
    options = SGD | options
    buffers = "momentum_buffers" if options["momentum"] else ""
    return Op("sgd_step_", ("params", "grads", buffers), options)


def _adam(**options: Any) -> Op:
    options = ADAM | options
    top = "max_exp_avg_sqs" if options["amsgrad"] else ""
    return Op("adam_step_", ("params", "grads", "exp_avgs", "exp_avg_sqs", top, "steps"), options)


def one(value: float) -> Tensor:
    """A number as a tensor of one element."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


OPS: dict[str, Op] = {
    "sgd": _sgd(),
    "sgd decay maximize": _sgd(weight_decay=0.1, maximize=True),
    "sgd momentum first": _sgd(momentum=0.9, dampening=0.3, first=True),
    "sgd momentum": _sgd(momentum=0.9, dampening=0.3, weight_decay=0.1),
    "sgd nesterov": _sgd(momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True),
    "sgd nesterov first": _sgd(momentum=0.8, nesterov=True, first=True),
    "sgd scaled": _sgd(momentum=0.9, grad_scale=one(3.0), found_inf=one(0.0)),
    "sgd scaled maximize": _sgd(grad_scale=one(8.0), maximize=True),
    "sgd found_inf": _sgd(momentum=0.9, grad_scale=one(8.0), found_inf=one(1.0)),
    "sgd tensor lr": _sgd(momentum=0.9, lr=one(0.05)),
    "sgd lr 0": _sgd(momentum=0.9, weight_decay=0.1, lr=0.0),
    "sgd tensor lr 0": _sgd(momentum=0.9, weight_decay=0.1, lr=one(0.0)),
    "adam": _adam(),
    "adam decay maximize": _adam(weight_decay=0.1, maximize=True),
    "adamw": _adam(weight_decay=0.1, decoupled=True),
    "adamw amsgrad": _adam(weight_decay=0.1, decoupled=True, amsgrad=True),
    "adam amsgrad maximize": _adam(amsgrad=True, maximize=True),
    "adam beta1 below a half": _adam(beta1=0.3, beta2=0.95, eps=1e-3),
    "adam scaled": _adam(grad_scale=one(3.0), found_inf=one(0.0)),
    "adamw scaled": _adam(decoupled=True, weight_decay=0.1, grad_scale=one(3.0), maximize=True),
    "adamw found_inf": _adam(decoupled=True, grad_scale=one(8.0), found_inf=one(1.0)),
    "adamw tensor lr": _adam(decoupled=True, weight_decay=0.1, lr=one(0.01).view(1)),
    "adamw lr 0": _adam(decoupled=True, weight_decay=0.1, lr=0.0),
    "adam tensor lr 0": _adam(weight_decay=0.1, lr=one(0.0)),
    "statistics": Op("row_statistics_", ("params", "grads"), {}),
    "mask": Op("row_mask_", ("params",), {"lr": 0.1}),
    "mask tensor lr": Op("row_mask_", ("params",), {"lr": one(0.1)}),
    "mask lr 0": Op("row_mask_", ("params",), {"lr": 0.0}),
}
