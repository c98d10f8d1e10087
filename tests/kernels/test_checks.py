"""Refused arguments: one error names the argument, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels import checks
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.rows import Rows, RowTable
from sparsekern.kernels.selfcheck.calls import ADAM, SGD, run_op


class _Call:
    """Arguments of a valid step."""

    def __init__(self) -> None:
        self.params: list[Any] = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(4))]
        self.table = RowTable([(param, 0) for param in self.params], [])
        self.grads: list[Any] = [torch.ones(4, 3), torch.ones(4)]
        self.m = [torch.ones(4, 3), torch.ones(4)]
        self.v = [torch.ones(4, 3), torch.ones(4)]
        self.top: list[Tensor] = []
        self.steps = [torch.ones(()), torch.ones(())]
        self.rows: Rows | None = self.table.rows_of(self.params)
        self.options: dict[str, Any] = {}

    def sgd(self) -> None:
        options = SGD | {"momentum": 0.9} | self.options
        run_op(_ops, "sgd_step_", self.params, self.grads, self.m, **options, rows=self.rows)

    def adam(self) -> None:
        options = ADAM | self.options
        lists = (self.params, self.grads, self.m, self.v, self.top, self.steps)
        run_op(_ops, "adam_step_", *lists, **options, rows=self.rows)


def _set(name: str, index: int, value: Any) -> Callable[[_Call], None]:
    def change(call: _Call) -> None:
        getattr(call, name)[index] = value

    return change


def _assign(**values: Any) -> Callable[[_Call], None]:
    def change(call: _Call) -> None:
        for name, value in values.items():
            setattr(call, name, value)

    return change


META = torch.ones(4, device="meta")
SPARSE = torch.ones(4).to_sparse()

BOTH = [
    (_set("grads", 1, torch.ones(5)), ValueError, r"grads\[1\]: got .*\[5\].*expected .*\[4\]"),
    (_set("grads", 1, torch.ones(4).double()), ValueError, r"grads\[1\]: got torch.float64"),
    (_set("grads", 1, SPARSE), TypeError, r"grads\[1\]: got layout torch.sparse_coo"),
    (_set("grads", 1, META), ValueError, r"grads\[1\]: got .*on meta, expected .*on cpu"),
    (_set("m", 0, torch.ones(3, 4)), ValueError, r"\[0\]: got .*\[3, 4\].*expected .*\[4, 3\]"),
    (_set("m", 1, torch.ones(4).half()), ValueError, r"\[1\]: got torch.float16"),
    (_set("params", 1, torch.ones(4).double()), ValueError, r"params\[1\]: got torch.float64"),
    (_set("params", 1, META), ValueError, r"params\[1\]: got .*on meta"),
    (_set("params", 0, torch.ones(4, 3).cfloat()), TypeError, r"params\[0\]: got torch.complex64"),
    (_set("params", 0, torch.ones(4, 3).int()), TypeError, r"params\[0\]: got torch.int32"),
    (_assign(grads=[torch.ones(4, 3)]), ValueError, r"grads: got 1 entries, expected 2"),
    (_assign(m=[]), ValueError, r"got 0 entries, expected 2"),
    (_assign(options={"lr": torch.ones(2)}), ValueError, r"lr: got .*\[2\]"),
    (_assign(options={"lr": torch.ones((), device="meta")}), ValueError, r"lr: got .*meta"),
    (_assign(options={"grad_scale": torch.ones(3)}), ValueError, r"grad_scale: got .*\[3\]"),
    (
        _assign(options={"found_inf": torch.ones((), dtype=torch.int64)}),
        ValueError,
        r"found_inf: got torch.int64",
    ),
    (lambda call: call.rows.starts.pop(), ValueError, r"rows.starts: got 1 entries, expected 2"),
    (lambda call: call.rows.dims.pop(), ValueError, r"rows.dims: got 1 entries, expected 2"),
    (lambda call: call.rows.starts.__setitem__(1, 5), ValueError, r"rows: got start 5.*table's 8"),
    (lambda call: call.rows.dims.__setitem__(1, 1), ValueError, r"rows: got .*dimension 1"),
]
ADAM_ONLY = [
    (_assign(top=[torch.ones(4, 3)]), ValueError, r"max_exp_avg_sqs: got 1 .*amsgrad"),
    (_assign(options={"amsgrad": True}), ValueError, r"max_exp_avg_sqs: got 0 entries"),
    (_set("v", 1, torch.ones(1)), ValueError, r"exp_avg_sqs\[1\]: got"),
    (_set("steps", 1, torch.ones(2)), ValueError, r"steps\[1\]: got .*\[2\]"),
    (_set("steps", 1, torch.ones((), dtype=torch.int64)), ValueError, r"steps\[1\]: got .*int64"),
    (_assign(steps=[torch.ones(())]), ValueError, r"steps: got 1 entries, expected 2"),
    (
        lambda call: (
            call.options.update(found_inf=torch.zeros(())),
            call.steps.__setitem__(0, torch.ones((), device="meta")),
        ),
        ValueError,
        r"steps\[0\]: got .*on meta, expected .*on cpu",
    ),
    (_assign(steps=[]), ValueError, r"steps: got 0 entries, expected 2"),
]
SGD_ONLY = [(_assign(options={"momentum": 0.0}), ValueError, r"momentum_buffers: got 2 .*momentum")]


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [("sgd", *case) for case in BOTH + SGD_ONLY] + [("adam", *case) for case in BOTH + ADAM_ONLY],
)
def test_refused(
    kind: str,
    change: Callable[[_Call], Any],
    error: type[Exception],
    message: str,
    warm: bool,
) -> None:
    """The refusal does not depend on an earlier successful check of the same tensors."""
    call = _Call()
    if warm:
        getattr(call, kind)()
    change(call)
    tensors = [*call.params, *call.grads, *call.m, *call.v, *call.steps, call.table.sums]
    plain = [t for t in tensors if t.device.type == "cpu" and t.layout is torch.strided]
    before = [t.detach().clone() for t in plain]
    with pytest.raises(error, match=message):
        getattr(call, kind)()
    for now, was in zip(plain, before, strict=True):
        assert torch.equal(now, was)


def test_refuses_what_changed_behind_the_same_objects() -> None:
    """`module.double()` and pruning by hand put other memory under the same parameters."""
    for data in (torch.ones(4, 3, dtype=torch.float64), torch.ones(2, 3)):
        call = _Call()
        call.params, call.grads, call.m = call.params[:1], call.grads[:1], call.m[:1]
        call.rows = None
        call.sgd()
        call.params[0].data = data
        call.grads = [torch.ones_like(data)]
        with pytest.raises(ValueError, match=r"momentum_buffers\[0\]"):
            call.sgd()


def test_a_table_on_another_device_is_named() -> None:
    call = _Call()
    call.table.penalty = call.table.penalty.to("meta")
    with pytest.raises(ValueError, match=r"rows.table: got arrays on meta"):
        call.adam()


def test_other_ops_check_too() -> None:
    call = _Call()
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        run_op(_ops, "row_statistics_", call.params, call.grads[::-1], rows=call.rows)
    with pytest.raises(ValueError, match="lr"):
        run_op(_ops, "row_mask_", call.params, lr=torch.ones(2), rows=call.rows)


def test_empty_lists_are_fine() -> None:
    run_op(_ops, "sgd_step_", [], [], [], **SGD, rows=None)
    run_op(_ops, "adam_step_", [], [], [], [], [], [], **ADAM, rows=None)
    run_op(_ops, "row_statistics_", [], [], rows=Rows(None, [], []))
    run_op(_ops, "row_mask_", [], lr=0.1, rows=Rows(None, [], []))


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (0, {"open_low": True}, ValueError, r"keep: got 0, expected a number in \(0, 1\]"),
        (1.5, {}, ValueError, r"keep: got 1.5, expected a number in \[0, 1\]"),
        (1, {"open_high": True}, ValueError, r"\[0, 1\)"),
        (float("nan"), {}, ValueError, "keep: got nan"),
        ("0.5", {}, TypeError, "keep: got '0.5' of type str"),
        (True, {}, TypeError, "keep: got True of type bool"),
    ],
)
def test_number(value: Any, options: dict[str, bool], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checks.number("keep", value, 0, 1, **options)
    assert checks.number("keep", 0.5, 0, 1, **options) == 0.5
