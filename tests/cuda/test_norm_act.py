"""The CUDA kernels of normalisation with its activation, emulated, equal the reference."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from kernels.norm_elementwise import (
    assert_backward,
    assert_far_from_zero,
    assert_forward,
    assert_trains,
)

from sparsekern.kernels.backends import reference
from sparsekern.kernels.backends.cuda import step as cuda_step
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.native import cuda_library
from sparsekern.kernels.options import NormInputs, NormOptions, Running
from sparsekern.kernels.selfcheck.norms import LARGE, LAYOUTS, laid_out, problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_layout(emulated: Any, activation: str, dtype: torch.dtype, layout: str) -> None:
    for residual, masked in ((True, 0.4), (False, 0.0), (True, 0.0), (False, 0.4)):
        given = problem(
            (3, 9, 5, 3), dtype, "contiguous", activation, residual=residual, masked=masked, training=residual
        )
        assert_forward(emulated, laid_out(given, layout))
        assert_backward(emulated, laid_out(given, layout))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_shape(emulated: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    given = laid_out(problem(shape, dtype, "contiguous", masked=0.3, seed=1), layout)
    assert_forward(emulated, given)
    assert_backward(emulated, given)


@pytest.mark.parametrize("lies", [(2, 3, 61 * 67), (2 * 61 * 67, 3, 1), (1, 1, 67 * 131)], ids=str)
def test_several_blocks_share_a_channel(emulated: Any, lies: tuple[int, int, int]) -> None:
    """In the shapes above; each block leaves four numbers, and so do all of them together."""
    scratch = cuda_step._target.library.sparsekern_cuda_norm_scratch(*lies, 4)
    assert scratch >= 4 * lies[1] * 3


def _layers() -> list[tuple[int, int, int]]:
    """Outer size, channels and inner size of layers of real networks, in both layouts."""
    found = []
    for batch, channels, edge in (
        *((8, 64, 128), (8, 16, 128), (32, 64, 56), (32, 256, 56), (32, 512, 7), (8, 37, 128), (8, 24, 64)),
        *((1, 8, 512), (2, 3, 224), (64, 2048, 7), (4, 1280, 8), (16, 20, 32), (1, 1, 64)),
    ):
        found += [(batch * edge * edge, channels, 1), (batch, channels, edge * edge)]
    return found


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_all_threads_of_a_block_merge_its_sums(emulated: Any, element_size: int) -> None:
    """A thread makes few merges one after the other, each of which waits for the one before."""
    for layer in _layers():
        merges = cuda_step._target.library.sparsekern_cuda_norm_merges(*layer, element_size)
        assert merges <= 14, layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics(emulated: Any, dtype: torch.dtype, momentum: float) -> None:
    """The kernels update those of the compute type; others are converted. Their versions rise once."""
    given = problem((4, 6, 5, 5), torch.float32, "contiguous", masked=0.4)
    inputs = NormInputs(given.x, None, given.weight, given.bias, given.mask)
    options = NormOptions("relu", True, 1e-5, momentum)
    results = []
    for backend in (reference, emulated):
        running = Running(torch.linspace(-1, 1, 6).to(dtype), torch.linspace(1, 2, 6).to(dtype))
        launches = cuda_step._target.library.sparsekern_cuda_launches()
        backend.norm_act_forward(inputs, running, options)
        results.append(running)
        assert [one._version for one in running if one is not None] == [1, 1]
    assert cuda_step._target.library.sparsekern_cuda_launches() == launches + 3
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)
        assert given.mask is not None and want is not None and got is not None
        still = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 4
        torch.testing.assert_close(got[given.mask], want[given.mask], rtol=still, atol=0)


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 9), (2, 4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dimensions_and_what_is_missing(emulated: Any, shape: tuple[int, ...], training: bool) -> None:
    given = problem(
        shape, torch.float32, "contiguous", "silu", residual=True, training=training, affine=False
    )
    layouts = ["contiguous_format", *(["channels_last_3d"] if len(shape) == 5 else [])]
    for layout in layouts:
        assert_forward(emulated, laid_out(given, layout))
        assert_backward(emulated, laid_out(given, layout))


@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_spoilt_gradients_are_not_counted(emulated: Any, layout: str, spoiler: float) -> None:
    for activation in ("identity", "relu"):
        given = laid_out(problem((4, 8, 5, 5), torch.float32, "contiguous", activation, masked=0.3), layout)
        given.grad[1, 3, 2, 2:4] = spoiler
        assert_backward(emulated, given)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_mean_and_variance_far_from_zero(emulated: Any, layout: str) -> None:
    assert_far_from_zero(emulated, layout)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_order_of_blocks_threads_or_addresses_changes_a_bit(
    emulated: Any, emulated_library: ctypes.CDLL, dtype: torch.dtype, layout: str
) -> None:
    runs = [(0, False, layout), (1, False, layout), (2, False, layout), (1, True, layout)]
    if layout == "contiguous_format":
        runs.append((0, False, "not aligned"))
    results = []
    for order, starve, where in runs:
        emulated_library.emulation_order(order, starve)
        plain = problem((9, 20, 17, 19), dtype, "contiguous", "silu", residual=True)
        given = laid_out(plain, where)
        y, mean, var = given.forward(emulated)
        results.append([y, mean, var, *given.backward(emulated, mean, var)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one is not None and two is not None and torch.equal(one, two)


def test_a_module_trains_on_it(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_trains(emulated, monkeypatch)


@pytest.mark.parametrize(("training", "forward"), [(True, 3), (False, 1)])
def test_launches(emulated: Any, training: bool, forward: int) -> None:
    given = problem((2, 4, 3, 3), torch.float32, "contiguous", training=training)
    library = cuda_step._target.library
    before = library.sparsekern_cuda_launches()
    _, mean, var = given.forward(emulated)
    assert library.sparsekern_cuda_launches() - before == forward
    given.backward(emulated, mean, var)
    assert library.sparsekern_cuda_launches() - before == forward + 4
    given.counts = None
    given.backward(emulated, mean, var)
    assert library.sparsekern_cuda_launches() - before == forward + 7


def test_null_is_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make = cuda_library.Norm
    monkeypatch.setattr(cuda_library, "Norm", lambda **fields: make(**fields | {"mean": None}))
    message = r"a normalisation of \[2, 4, 3, 3\]: an address is missing \(error 1\)"
    with pytest.raises(RuntimeError, match=message):
        problem((2, 4, 3, 3), torch.float32, "contiguous").forward(emulated)
