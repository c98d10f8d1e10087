"""Malformed arguments: an op refuses them with an error and changes nothing, or does what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.tolerance import assert_elementwise
from torch import Tensor
from torch.nn import Parameter

from sparsekern import _native, _ops
from sparsekern._rows import RowArrays, Rows, RowTable
from sparsekern.backends import reference

SHAPES = [((3, 4), 0), ((5,), 0), ((2, 6, 2, 2), 1), ((4, 1, 3), 0)]
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "amsgrad": False}
SGD = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "first": False}
LISTS = {
    "adam_step_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
    "sgd_step_": ("params", "grads", "momentum_buffers"),
    "row_statistics_": ("params", "grads"),
    "row_mask_": ("params",),
}


@dataclass
class Call:
    """The arguments of an op, to be spoilt."""

    op: str
    lists: dict[str, list[Any]]
    options: dict[str, Any]
    arrays: RowArrays
    starts: list[int]
    dims: list[int]
    what: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, op: str) -> Call:
        generator = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(shape, generator=generator)) for shape, _ in SHAPES]
        table = RowTable([(p, dim) for p, (_, dim) in zip(params, SHAPES, strict=True)], ([0], []))
        table.threshold.fill_(0.5)
        # Wherever a tensor is placed, all of its rows have as many.
        table.elements.fill_(1)
        table.countdown[2] = 0
        table.countdown[4] = 3
        like = [torch.rand(p.shape, generator=generator) for p in params]
        known = {"params": [p.detach() for p in params], "max_exp_avg_sqs": []}
        known |= {"steps": [torch.ones(()) for _ in params]}
        lists = {name: known[name] if name in known else [t.clone() for t in like] for name in LISTS[op]}
        options = {"adam_step_": ADAM, "sgd_step_": SGD}.get(op, {})
        if op in ("adam_step_", "sgd_step_"):
            options = options | {"maximize": False, "grad_scale": None, "found_inf": None}
        if op != "row_statistics_":
            options = options | {"lr": 0.01}
        arrays = RowArrays._make(getattr(table, name) for name in RowArrays._fields)
        return cls(op, lists, options, arrays, [v.start for v in table.views], [v.dim for v in table.views])

    def make(self, ops: Any) -> None:
        rows = Rows(self.arrays, self.starts, self.dims)
        getattr(ops, self.op)(*self.lists.values(), **self.options, rows=rows)

    def tensors(self) -> list[Tensor]:
        """All that can be written to and compared."""
        every = [t for tensors in self.lists.values() for t in tensors]
        every += [*self.arrays[:8], *self.options.values()]
        return [
            t for t in every if isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        ]


def spoil_tensor(tensor: Tensor, how: str) -> Any:
    """Something else in the place of a tensor."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    return {
        "int": lambda: tensor.to(torch.int64),
        "complex": lambda: tensor.to(torch.complex64),
        "double": lambda: tensor.double(),
        "half": lambda: tensor.half(),
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.reshape(1, -1).to_sparse(),
        "flat": lambda: tensor.reshape(-1),
        "longer": lambda: torch.cat([tensor.reshape(-1)] * 2),
        "empty": lambda: tensor.new_empty(0),
        "scalar": lambda: tensor.new_ones(()),
        "expanded": lambda: tensor.reshape(-1)[:1].reshape([1] * tensor.dim()).expand(tensor.shape),
        "gaps": lambda: torch.stack([tensor, tensor], -1)[..., 0],
        "reversed": lambda: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.clone(),
    }[how]()


HOW = ("int", "complex", "double", "half", "meta", "sparse", "flat", "longer", "empty", "scalar", "expanded")
HOW = (*HOW, "gaps", "reversed")


@st.composite
def calls(draw: st.DrawFn) -> Call:
    call = Call.of(draw(st.sampled_from(sorted(LISTS))))
    for _ in range(draw(st.integers(1, 2))):
        spoil = draw(st.sampled_from([spoil_list, spoil_entry, spoil_place, spoil_array, spoil_scalar]))
        spoil(draw, call)
    return call


def spoil_list(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from(sorted(call.lists)))
    call.what.append(f"{name} of another length")
    tensors = call.lists[name]
    if draw(st.booleans()):
        del tensors[-1:]
    else:
        tensors.append(torch.zeros(2))


def spoil_entry(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from([name for name in sorted(call.lists) if call.lists[name]]))
    at = draw(st.integers(0, len(call.lists[name]) - 1))
    how = draw(st.sampled_from(HOW))
    call.what.append(f"{name}[{at}] {how}")
    tensor = call.lists[name][at]
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        call.lists[name][at] = spoil_tensor(tensor, how)


def spoil_place(draw: st.DrawFn, call: Call) -> None:
    places = draw(st.sampled_from([call.starts, call.dims]))
    at = draw(st.integers(0, len(places) - 1))
    places[at] = draw(st.sampled_from([-7, -1, 0, 1, 2, 5, 17, 18, 19, 1000, 2**31, 2**40, -(2**40)]))
    call.what.append(f"starts {call.starts}, dims {call.dims}")


def spoil_array(draw: st.DrawFn, call: Call) -> None:
    name = draw(st.sampled_from(RowArrays._fields[:8]))
    how = draw(st.sampled_from([h for h in HOW if h not in ("flat", "reversed")]))
    call.what.append(f"rows.{name} {how}")
    array = getattr(call.arrays, name)
    if isinstance(array, Tensor) and array.layout is torch.strided:
        call.arrays = call.arrays._replace(**{name: spoil_tensor(array, how)})


def spoil_scalar(draw: st.DrawFn, call: Call) -> None:
    names = [name for name in ("lr", "grad_scale", "found_inf") if name in call.options]
    if not names:
        return
    name = draw(st.sampled_from(names))
    values = [torch.zeros(2), torch.ones((), dtype=torch.int64), torch.ones((), device="meta")]
    values += [torch.zeros(0), torch.ones(1), torch.ones((), dtype=torch.float64)]
    call.options[name] = draw(st.sampled_from(values)).clone()
    call.what.append(f"{name} {call.options[name]}")


@pytest.mark.skipif(_native.load() is None, reason="the native kernels are not built")
@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_refused_or_done(call: Call) -> None:
    twin = copy.deepcopy(call)
    before = [tensor.clone() for tensor in call.tensors()]
    try:
        call.make(_ops)
    except (TypeError, ValueError) as error:
        assert ": " in str(error), f"{call.what}: {error!r} names no argument"
        for tensor, old in zip(call.tensors(), before, strict=True):
            assert torch.equal(tensor, old), f"{call.what}: changed before {error!r}"
        return
    found_inf = call.options.get("found_inf")
    if isinstance(found_inf, Tensor) and bool(found_inf == 1):
        assert all(torch.equal(tensor, old) for tensor, old in zip(call.tensors(), before, strict=True))
        return
    twin.make(reference)
    for mine, theirs in zip(call.tensors(), twin.tensors(), strict=True):
        near = 1e-5 * (1 + theirs.double().abs().nan_to_num(0, 0, 0)) if theirs.is_floating_point() else 0.0
        assert_elementwise(str(call.what), mine, theirs, near)


def test_a_spoilt_call_is_found() -> None:
    """The control: what the test above does to a call is noticed, and an unspoilt one is done."""
    make: Callable[[str], Call] = Call.of
    for op in LISTS:
        make(op).make(_ops)
    call = make("adam_step_")
    call.lists["grads"][1] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"grads\[1\]: got torch.float32 \[4\] on cpu, expected"):
        call.make(_ops)
