"""Batch normalisation with its activation: the native kernels against the reference, and its op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernels.norm_cases import assert_equals_reference

from sparsekern.kernels import native as _native
from sparsekern.kernels.backends import cpu, reference
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.norm_ops import norm_act
from sparsekern.kernels.options import Moments, NormInputs, NormOptions, Running
from sparsekern.kernels.selfcheck.norms import FORMATS, SHAPES, problem

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

native = pytest.mark.skipif(_native.load() is None, reason="the native kernels are not built")


@native
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_reference(activation: str, dtype: torch.dtype, memory: str) -> None:
    for shape in SHAPES:
        for residual in (False, True):
            for masked in (0.0, 0.4):
                assert_equals_reference(
                    cpu, problem(shape, dtype, memory, activation, residual=residual, masked=masked)
                )


@native
@pytest.mark.parametrize("memory", FORMATS)
def test_equals_reference_with_running_statistics(memory: str) -> None:
    for shape in SHAPES:
        for masked in (0.0, 0.4):
            given = problem(shape, torch.float32, memory, masked=masked, residual=True, training=False)
            assert_equals_reference(cpu, given)


@native
@pytest.mark.parametrize("memory", FORMATS)
def test_equals_reference_without_affine_and_counts(memory: str) -> None:
    for shape in SHAPES:
        given = problem(shape, torch.float32, memory, "hardswish", affine=False)
        given.counts = None
        assert_equals_reference(cpu, given)


@native
def test_memory_in_any_order() -> None:
    """Tensors with gaps, and gradients in another memory order, give the results of dense copies."""
    whole = problem((4, 6, 5, 8), torch.float32, "contiguous", residual=True)
    assert whole.residual is not None and whole.weight is not None and whole.bias is not None

    def thinned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.permute(2, 1, 0, 3)[:, ::2]

    strided = replace(
        whole,
        x=thinned(whole.x),
        grad=thinned(whole.grad).contiguous(memory_format=torch.channels_last),
        residual=thinned(whole.residual),
        weight=whole.weight[::2],
        bias=whole.bias[::2],
        running=(whole.running[0][::2], whole.running[1][::2]),
        counts=None,
    )
    dense = replace(
        strided,
        **{name: getattr(strided, name).contiguous() for name in ("x", "grad", "residual", "weight", "bias")},
    )
    y, mean, var = strided.forward(cpu)
    assert torch.equal(y, dense.forward(cpu)[0])
    for mine, theirs in zip(strided.backward(cpu, mean, var), dense.backward(cpu, mean, var), strict=True):
        assert mine is not None and theirs is not None and torch.equal(mine, theirs)


@native
def test_the_default_device_does_not_matter() -> None:
    given = problem((3, 5, 2, 2), torch.float32, "contiguous", masked=0.3, residual=True)
    with torch.device("meta"):
        _, mean, var = given.forward(cpu)
        found = given.backward(cpu, mean, var)
        plain = given.backward(reference, mean, var)
    assert_equals_reference(cpu, given)
    assert all(tensor is None or tensor.device.type == "cpu" for tensor in [*found, *plain])


@native
def test_counts_that_lie_with_gaps() -> None:
    """Strided counts equal dense ones, and the memory between them stays unchanged."""
    given = problem((2, 6, 3, 4), torch.float32, "contiguous")
    assert given.counts is not None
    _, mean, var = given.forward(cpu)
    want = given.backward(cpu, mean, var)[4:]
    wide = [torch.stack([array, array], 1) for array in given.counts.arrays]
    counts = ChannelCounts.of([array[:, 0] for array in wide], given.counts.tau, given.counts.decay)
    options = NormOptions(**given.options)
    cpu.norm_act_backward(given.grad, given.inputs, Moments(mean, var), options, counts)
    for array, before, after in zip(wide, given.counts.arrays, want, strict=True):
        assert after is not None and torch.equal(array[:, 0], after) and torch.equal(array[:, 1], before)


BAND = 64


def _banded(values: torch.Tensor, bands: list[torch.Tensor]) -> torch.Tensor:
    """A copy with NaN before and after it in memory."""
    memory = torch.full((values.numel() + 2 * BAND,), torch.nan, dtype=values.dtype)
    bands += [memory[:BAND], memory[-BAND:]]
    return memory[BAND:-BAND].as_strided(values.shape, values.stride(), BAND).copy_(values)


@native
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_nothing_around_the_data_is_read_or_written(
    dtype: torch.dtype, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bands: list[torch.Tensor] = []
    empty_like, empty = torch.empty_like, torch.empty

    def poisoned(like: torch.Tensor) -> torch.Tensor:
        return _banded(empty_like(like).fill_(torch.nan), bands)

    def poisoned_vector(count: int, **options: Any) -> torch.Tensor:
        return _banded(empty(count, **options).fill_(torch.nan), bands)

    for shape in SHAPES:
        given = problem(shape, dtype, memory, residual=True, masked=0.3)
        y, mean, var = given.forward(cpu)
        want = [y, mean, var, *given.backward(cpu, mean, var)]
        names = ("x", "grad", "residual", "weight", "bias")
        inside = replace(given, **{name: _banded(getattr(given, name), bands) for name in names})
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", poisoned)
            patch.setattr(torch, "empty", poisoned_vector)
            y, mean, var = inside.forward(cpu)
            got = [y, mean, var, *inside.backward(cpu, mean, var)]
        for mine, theirs in zip(got, want, strict=True):
            assert mine is not None and theirs is not None and torch.equal(mine, theirs)
    assert all(band.isnan().all() for band in bands)


@native
def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """Moments are accurate if the mean is far from 0 and the first elements are outliers."""
    for memory in FORMATS:
        given = problem((4, 20, 40, 30), torch.float32, memory)
        given.x = given.x + 2000
        given.x[0] = 0
        _, mean, var = given.forward(cpu)
        exact = torch.var_mean(given.x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), exact[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_what_is_not_finite_are_not_counted(
    backend: str, force_backend: Callable[[str], None]
) -> None:
    if backend == "cpu" and _native.load() is None:
        pytest.skip("the native kernels are not built")
    force_backend(backend)
    counts = ChannelCounts.zeros(4)
    counts.threshold.fill_(0.1)
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    grad = torch.ones(2, 4, 3, 3)
    grad[0, 1, 0, 0] = torch.inf
    norm_act(NormInputs(x), Running(), NormOptions("identity", True, 1e-5), counts).backward(grad)
    assert counts.activity[1] == 0 and counts.threshold[1] == torch.tensor(0.1)
    assert (counts.activity[[0, 2, 3]] > 0).all() and (counts.threshold[[0, 2, 3]] == 1).all()


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, training: bool, memory: str) -> None:
    given = problem((2, 3, 2, 4), torch.float64, memory, activation, residual=True, training=training)
    inputs = [
        t.requires_grad_() for t in (given.x, given.residual, given.weight, given.bias) if t is not None
    ]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return norm_act(NormInputs(*inputs), Running(*given.running), NormOptions(**given.options))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_opcheck(masked: float) -> None:
    given = problem((2, 4, 3, 3), torch.float32, "channels_last", residual=True, masked=masked)
    given.x.nan_to_num_()
    assert given.counts is not None
    options = {**given.options, "tau": 1.0, "decay": 0.9}
    operands = (*given.inputs, *given.running)
    for_autograd = [
        t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() and i < 4 else t
        for i, t in enumerate(operands)
    ]
    forward = torch.ops.sparsekern.norm_act.default
    torch.library.opcheck(forward, (*for_autograd, given.counts.arrays), options)
    mean, var = (torch.rand(4) + 0.5 for _ in range(2))
    backward = torch.ops.sparsekern.norm_act_backward.default
    detached = [t.detach() if t is not None else None for t in operands[:4]]
    args = (given.grad, *detached, given.mask, mean, var, given.counts.arrays)
    torch.library.opcheck(backward, args, options, test_utils=("test_schema", "test_faketensor"))


def test_the_dispatcher_gives_the_same() -> None:
    given = problem((2, 4, 3, 3), torch.float32, "contiguous", residual=True)
    assert given.counts is not None
    results = []
    for direct in (True, False):
        inputs = [t.clone().requires_grad_() for t in (given.x, given.residual, given.weight, given.bias)]
        counts = ChannelCounts.of([a.clone() for a in given.counts.arrays], 1.5, 0.9)
        if direct:
            y = norm_act(NormInputs(*inputs), Running(*given.running), NormOptions(**given.options), counts)
        else:
            op = torch.ops.sparsekern.norm_act.default
            y = op(*inputs, None, *given.running, counts.arrays, **given.options, tau=1.5, decay=0.9)[0]
        y.backward(given.grad)
        results.append([y, *(t.grad for t in inputs), *counts.arrays])
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation: got 'gelu', expected one of identity, relu"),
        ({"x": torch.zeros(3)}, r"x: got torch.float32 \[3\], expected floating-point \[N, C"),
        ({"x": torch.zeros(0, 4, 2, 2)}, r"x: got torch.float32 \[0, 4, 2, 2\]"),
        ({"x": torch.zeros(2, 4, 2, 2, dtype=torch.int64)}, "x: got torch.int64"),
        ({"x": torch.zeros(1, 4, 1, 1)}, r"x: got \[1, 4, 1, 1\], expected more than 1 value per channel"),
        ({"residual": torch.zeros(2, 4, 2)}, r"residual: got torch.float32 \[2, 4, 2\] on cpu, expected"),
        ({"residual": torch.zeros(2, 4, 2, 2).double()}, "residual: got torch.float64"),
        (
            {"weight": torch.zeros(5)},
            r"weight: got torch.float32 \[5\] on cpu, expected floating-point \[4\]",
        ),
        ({"bias": torch.zeros(4, 1)}, r"bias: got torch.float32 \[4, 1\]"),
        ({"mask": torch.zeros(4)}, "mask: got torch.float32, expected torch.bool"),
        ({"training": False}, "running_mean, running_var: got None"),
        ({"counts": ChannelCounts.zeros(3)}, r"counts.threshold: got torch.float32 \[3\]"),
        ({"weight": torch.zeros(4, device="meta")}, r"weight: got torch.float32 \[4\] on meta"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    inputs, options = NormInputs(torch.zeros(2, 4, 2, 2)), NormOptions("relu", True, 1e-5)
    counts = change.pop("counts", None)
    for name, value in change.items():
        if name in NormInputs._fields:
            inputs = inputs._replace(**{name: value})
        else:
            options = options._replace(**{name: value})
    with pytest.raises(ValueError, match=message):
        norm_act(inputs, Running(), options, counts)


def test_shapes_cover_what_is_cut() -> None:
    """Some shapes leave remainders of blocks (64 elements) and of vectors (16 channels)."""
    assert any(n * h * w % 64 for n, _, h, w in SHAPES)
    assert any(c % 16 for _, c, _, _ in SHAPES)
