"""Malformed arguments: an op refuses them with an error and changes nothing, or equals the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.tolerance import assert_elementwise
from torch import Tensor
from torch.nn import Parameter

from sparsekern.kernels import native as _native
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import choose, reference
from sparsekern.kernels.rows import ChannelArrays, RowArrays, Rows, RowTable
from sparsekern.kernels.selfcheck.calls import run_op

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
        # All rows of a tensor have the same number of elements, wherever the tensor lies in the table.
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
        run_op(ops, self.op, *self.lists.values(), **self.options, rows=rows)

    def tensors(self) -> list[Tensor]:
        """All tensors that an op can write to."""
        every = [t for tensors in self.lists.values() for t in tensors]
        every += [*self.arrays[:8], *self.options.values()]
        return [
            t for t in every if isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        ]


def spoil_tensor(tensor: Tensor, how: str) -> Any:
    """Replace a tensor by another value."""
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
    """The control: the spoilt calls of the test above are detected, and an unspoilt one succeeds."""
    make: Callable[[str], Call] = Call.of
    for op in LISTS:
        make(op).make(_ops)
    call = make("adam_step_")
    call.lists["grads"][1] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"grads\[1\]: got torch.float32 \[4\] on cpu, expected"):
        call.make(_ops)


# Two gates a channel, one, none; a row that is the gate of two channels. 18 rows.
GATES = [[0, 5], [17], [], [3, 2, 5]]
INDICES = (-(2**63), -(2**40), -1, 0, 1, 2, 5, 6, 7, 17, 18, 19, 2**31, 2**61, 2**63 - 1)


def channel_arrays() -> ChannelArrays:
    """Arrays after a step and before the means per channel."""
    generator = torch.Generator().manual_seed(0)
    table = RowTable([(Parameter(torch.ones(shape)), dim) for shape, dim in SHAPES], GATES, decay=0.75)
    for array in (table.sums, table.channel_dot, table.channel_dot_sq):
        array.copy_(torch.randn(array.shape, generator=generator))
    table.pending.fill_(1)
    return ChannelArrays._make(getattr(table, name) for name in ChannelArrays._fields)


def spoil_index(draw: st.DrawFn, arrays: ChannelArrays) -> ChannelArrays:
    """An offset or a row that may be out of range."""
    name, array = drawn_indices(draw, arrays)
    if len(array):
        array[draw(st.integers(0, len(array) - 1))] = draw(st.sampled_from(INDICES))
    return arrays._replace(**{name: array})


def spoil_length(draw: st.DrawFn, arrays: ChannelArrays) -> ChannelArrays:
    """Indices left out, or more of them."""
    name, array = drawn_indices(draw, arrays)
    if draw(st.booleans()):
        array = array[: draw(st.integers(0, len(array)))]
    return arrays._replace(**{name: torch.cat([array, array[-1:]]) if draw(st.booleans()) else array})


def drawn_indices(draw: st.DrawFn, arrays: ChannelArrays) -> tuple[str, Tensor]:
    """One of the two index arrays; a valid one if more than its values was spoilt before."""
    name = draw(st.sampled_from(["gate_offsets", "gate_rows"]))
    array = getattr(arrays, name)
    whole = array.layout is torch.strided and array.dim() == 1 and array.dtype is torch.int64
    return name, (array if whole and array.device.type == "cpu" else getattr(channel_arrays(), name)).clone()


def spoil_kind(draw: st.DrawFn, arrays: ChannelArrays) -> ChannelArrays:
    """Another dtype, layout, device or shape."""
    name = draw(st.sampled_from(ChannelArrays._fields[:-1]))
    array, how = getattr(arrays, name), draw(st.sampled_from(HOW))
    fits = isinstance(array, Tensor) and array.layout is torch.strided
    return arrays._replace(**{name: spoil_tensor(array, how)}) if fits else arrays


@st.composite
def spoilt_gates(draw: st.DrawFn) -> ChannelArrays:
    arrays = channel_arrays()
    for _ in range(draw(st.integers(1, 2))):
        arrays = draw(st.sampled_from([spoil_index, spoil_length, spoil_kind]))(draw, arrays)
    return arrays


def misfits(arrays: ChannelArrays) -> bool:
    """Whether the op has to refuse the arguments; ``channel_dot`` has one element per channel."""
    good = channel_arrays()
    for name, array, expected in zip(ChannelArrays._fields[:-1], arrays, good, strict=False):
        same = array.layout is torch.strided and array.is_contiguous() and array.dtype is expected.dtype
        if not same or array.device != expected.device:
            return True
        if name != "gate_rows" and array.shape != expected.shape:
            return True
    if arrays.gate_rows.dim() != 1:
        return True
    offsets, rows = arrays.gate_offsets.tolist(), arrays.gate_rows.tolist()
    ends = offsets[0] != 0 or offsets[-1] != len(rows)
    return ends or offsets != sorted(offsets) or any(not 0 <= row < len(good.sums) for row in rows)


def plain(arrays: ChannelArrays) -> list[Tensor]:
    """The tensors that can be compared."""
    return [a for a in arrays[:-1] if a.layout is torch.strided and a.device.type == "cpu"]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spoilt_gates())
def test_gates_are_refused_or_folded(backend: str, arrays: ChannelArrays) -> None:
    if backend == "native" and _native.load() is None:
        pytest.skip("the native kernels are not built")
    before = [array.clone() for array in plain(arrays)]
    chosen = reference if backend == "reference" else choose(torch.device("cpu"))
    with patch.object(_ops, "choose", lambda device: chosen):
        if misfits(arrays):
            with pytest.raises(ValueError, match=r"^(table\.\w+|gates): got .*, expected "):
                _ops.channel_moments_(arrays)
            for array, old in zip(plain(arrays), before, strict=True):
                assert torch.equal(array, old)
            return
        _ops.channel_moments_(arrays)
    _, rows, sums, dot, dot_sq, updates, pending = before
    ends = arrays.gate_offsets.tolist()
    x = torch.stack([sums[rows[a:b], 1].sum() for a, b in pairwise(ends)])
    torch.testing.assert_close(arrays.channel_dot, 0.75 * dot + 0.25 * x)
    torch.testing.assert_close(arrays.channel_dot_sq, 0.75 * dot_sq + 0.25 * x * x)
    assert not arrays.sums[:, 1].any() and torch.equal(arrays.sums[:, ::2], sums[:, ::2])
    assert updates + 1 == arrays.updates and pending == 1 and arrays.pending == 0


def test_gates_written_to_after_a_call_are_read_again() -> None:
    arrays = channel_arrays()
    for row in (4, 18, 5, -1):
        arrays.gate_rows[2] = row
        if 0 <= row < 18:
            _ops.channel_moments_(arrays)
        else:
            with pytest.raises(ValueError, match=r"^gates: got rows from .*, expected them in \[0, 18\)"):
                _ops.channel_moments_(arrays)
    with torch.inference_mode():
        arrays = arrays._replace(gate_rows=torch.tensor([0, 5, 17, 3, 2, 5]))
        _ops.channel_moments_(arrays)
        arrays.gate_rows[2] = 18
        with pytest.raises(ValueError, match=r"^gates: got rows"):
            _ops.channel_moments_(arrays)
