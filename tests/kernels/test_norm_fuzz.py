"""Malformed arguments of a normalisation: refused with nothing changed, or computed as the reference does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels.test_fuzz import HOW, spoil_tensor
from kernels.tolerance import assert_elementwise
from torch import Tensor

from sparsekern.kernels import native as _native
from sparsekern.kernels import norm_ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.options import NormInputs, NormOptions, Running

SHAPES = [(3, 6, 4, 5), (2, 5), (4, 3, 2, 1), (2, 64, 3, 3)]
VECTORS = ("weight", "bias", "running_mean", "running_var", "mask")
COUNTS = ("threshold", "activity", "updates")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Tolerance per element for numbers of about 10: a few roundings of the dtype of x, or of the vectors.
NEAR = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}


@dataclass
class Call:
    """The arguments of one forward and one backward pass, to be spoilt."""

    tensors: dict[str, Any]
    options: dict[str, Any]
    what: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Call:
        generator = torch.Generator().manual_seed(0)

        def randn(size: tuple[int, ...]) -> Tensor:
            return torch.randn(size, generator=generator)

        channels = shape[1:2]
        compute = torch.float64 if dtype is torch.float64 else torch.float32
        vectors = {name: randn(channels).to(compute) for name in VECTORS}
        vectors["running_var"] = vectors["running_var"].abs() + 0.5
        vectors["mask"] = vectors["mask"] > 0.7
        counts = {"threshold": randn(channels).abs(), "activity": randn(channels).abs()}
        data = {name: randn(shape).to(dtype) for name in ("x", "residual", "grad")}
        return cls(data | vectors | counts | {"updates": torch.ones(1)}, options)

    def make(self, backend: Any) -> list[Tensor | None]:
        """The output and the gradients."""
        given = dict(self.tensors)
        grad, counts = given.pop("grad"), ChannelCounts(*(given.pop(name) for name in COUNTS), 1.5, 0.9)
        leaves = []
        for name in ("x", "residual", "weight", "bias"):
            if isinstance(given[name], Tensor) and given[name].is_floating_point():
                given[name] = given[name].detach().requires_grad_()
                leaves.append(given[name])
        with patch.object(norm_ops, "choose", backend):
            inputs = NormInputs(*(given[name] for name in NormInputs._fields))
            running = Running(given["running_mean"], given["running_var"])
            y = norm_ops.norm_act(inputs, running, NormOptions(**self.options), counts)
            y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def state(self) -> list[Tensor]:
        """All tensors that the passes can write to."""
        return [
            t
            for t in self.tensors.values()
            if isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu"
        ]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    training = draw(st.booleans())
    options = {"activation": draw(st.sampled_from(ACTIVATIONS)), "training": training, "eps": 1e-5}
    call = Call.of(shape, dtype, **options, momentum=0.1 if training else 0.0)
    if len(shape) == 4 and draw(st.booleans()):
        last = draw(st.sampled_from([["x", "residual", "grad"], ["x"], ["grad"]]))
        for name in last:
            call.tensors[name] = call.tensors[name].contiguous(memory_format=torch.channels_last)
        call.what.append(f"channels last {last}")
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(call.tensors)))
        tensor = call.tensors[name]
        # Torch itself refuses a gradient that does not fit the output.
        how = draw(st.sampled_from(("expanded", "gaps", "reversed") if name == "grad" else (*HOW, "None")))
        if how == "None" and name not in ("x", "grad", *COUNTS):
            call.tensors[name] = None
            call.what.append(f"no {name}")
        elif isinstance(tensor, Tensor) and tensor.layout is torch.strided and how != "None":
            call.tensors[name] = spoil_tensor(tensor, how)
            call.what.append(f"{name} {how}")
    return call


@pytest.mark.skipif(_native.load() is None, reason="the native kernels are not built")
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_refused_or_done(call: Call) -> None:
    twin = copy.deepcopy(call)
    before = [tensor.clone() for tensor in call.state()]
    try:
        found = call.make(norm_ops.choose)
    except (TypeError, ValueError) as error:
        assert ": " in str(error), f"{call.what}: {error!r} names no argument"
        for tensor, old in zip(call.state(), before, strict=True):
            assert torch.equal(tensor, old), f"{call.what}: changed before {error!r}"
        return
    want = twin.make(lambda device: reference)
    for mine, theirs in zip([*found, *call.state()], [*want, *twin.state()], strict=True):
        assert (mine is None) == (theirs is None), call.what
        if mine is not None and theirs is not None:
            assert mine.dtype is theirs.dtype and mine.shape == theirs.shape, call.what
            near = max(NEAR[call.tensors["x"].dtype], NEAR.get(mine.dtype, 0.0))
            size = 1 + theirs.double().abs().nan_to_num(0, 0, 0)
            assert_elementwise(str(call.what), mine, theirs, near * size)
