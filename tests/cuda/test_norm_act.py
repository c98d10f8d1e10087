"""The CUDA kernels of normalisation with its activation, emulated, equal the reference."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from norm_cases import ACTIVATIONS, DTYPES, assert_backward, assert_forward, assert_trains, case
from torch import Tensor

from sparsekern import _cuda
from sparsekern.backends import cuda_norm

LAYOUTS = ("contiguous", "channels_last", "permuted", "not aligned")

# Of one element per channel and outer index; odd; packs that fit; long planes, whole and in pieces; many
# outer indices; several blocks for each channel, in both layouts; more channels than a tile has.
SHAPES = (
    (5, 7, 1, 1),
    (3, 5, 3, 7),
    (2, 16, 4, 4),
    (2, 3, 61, 67),
    (2, 2, 67, 131),
    (700, 3, 2, 1),
    (3, 1, 53, 59),
    (37, 40, 7, 9),
    (5, 264, 3, 3),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_layout(emulated: Any, activation: str, dtype: torch.dtype, layout: str) -> None:
    for residual, masked, training in ((True, True, True), (False, False, False)):
        given = case((3, 9, 5, 3), dtype, layout, residual=residual, masked=masked)
        assert_forward(emulated, given, activation, training)
        assert_backward(emulated, given, activation, training)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(emulated: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    given = case(shape, dtype, layout, residual=False, masked=shape[1] > 1)
    assert_forward(emulated, given, "relu", training=True)
    assert_backward(emulated, given, "relu", training=True)


@pytest.mark.parametrize("layout", [(2, 3, 61 * 67), (2 * 61 * 67, 3, 1), (1, 1, 67 * 131)], ids=str)
def test_several_blocks_share_a_channel(emulated: Any, layout: tuple[int, int, int]) -> None:
    """In the shapes above; each block leaves four numbers, and so do all of them together."""
    scratch = emulated._target.library.sparsekern_cuda_norm_scratch(*layout, 4)
    assert scratch >= 4 * layout[1] * 3


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 9), (2, 4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dimensions_and_what_is_missing(emulated: Any, shape: tuple[int, ...], training: bool) -> None:
    given = case(shape, torch.float32, "contiguous", residual=True, masked=False, affine=False)
    assert_forward(emulated, given, "silu", training)
    assert_backward(emulated, given, "silu", training)


@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_spoilt_gradients_are_not_counted(emulated: Any, layout: str, spoiler: float) -> None:
    given = case((4, 8, 5, 5), torch.float32, layout, residual=False, masked=True)
    given.grad[1, 3, 2, 2] = spoiler
    assert_backward(emulated, given, "identity", training=True)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_masked_channels_are_not_read(emulated: Any, layout: str) -> None:
    given = case((4, 8, 5, 5), torch.float32, layout, residual=True, masked=True)
    assert given.mask is not None
    given.x[:, given.mask] = float("nan")
    assert_forward(emulated, given, "relu", training=True)
    assert_backward(emulated, given, "relu", training=True)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_mean_and_variance_far_from_zero(emulated: Any, layout: str) -> None:
    """Also where the first elements lie elsewhere than all others."""
    given = case((6, 8, 33, 35), torch.float32, layout, residual=False, masked=False)
    given.x.add_(1000)
    given.x[0, :, 0, 0] = 0
    _, mean, var = emulated.norm_act_forward(*given.forward(), activation="identity", training=True, eps=1e-5)
    want_var, want_mean = torch.var_mean(given.x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), want_mean, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(var.double(), want_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_order_of_blocks_threads_or_addresses_changes_a_bit(
    emulated: Any, emulated_library: ctypes.CDLL, dtype: torch.dtype, layout: str
) -> None:
    results = []
    for order, where in ((0, layout), (1, layout), (2, layout), (0, "not aligned")):
        if where == "not aligned" and layout != "contiguous":
            continue
        emulated_library.emulation_order(order)
        given = case((9, 20, 17, 19), dtype, where, residual=True, masked=True)
        y, mean, var = emulated.norm_act_forward(*given.forward(), activation="silu", training=True, eps=1e-5)
        gradients = emulated.norm_act_backward(
            *given.backward(mean, var), activation="silu", training=True, eps=1e-5, counts=given.counts
        )
        results.append([y, mean, var, *gradients, *given.counts.arrays])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_a_module_trains_on_it(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_trains(emulated, monkeypatch)


@pytest.mark.parametrize(("training", "forward"), [(True, 3), (False, 1)])
def test_launches(emulated: Any, training: bool, forward: int) -> None:
    given = case((2, 4, 3, 3), torch.float32, "contiguous", residual=False, masked=False)
    library = emulated._target.library
    before = library.sparsekern_cuda_launches()
    options: dict[str, Any] = {"activation": "relu", "training": training, "eps": 1e-5}
    _, mean, var = emulated.norm_act_forward(*given.forward(), **options)
    assert library.sparsekern_cuda_launches() - before == forward
    emulated.norm_act_backward(*given.backward(mean, var), **options, counts=None)
    assert library.sparsekern_cuda_launches() - before == forward + 3
    versions = [array._version for array in given.counts.arrays]
    emulated.norm_act_backward(*given.backward(mean, var), **options, counts=given.counts)
    assert library.sparsekern_cuda_launches() - before == forward + 7
    assert all(a._version > v for a, v in zip(given.counts.arrays, versions, strict=True))


def test_null_is_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case((2, 4, 3, 3), torch.float32, "contiguous", residual=False, masked=False)
    fill = cuda_norm._call

    def without_mean(x: Tensor, *arguments: Any, **options: Any) -> _cuda.Norm:
        call = fill(x, *arguments, **options)
        call.mean = None
        return call

    monkeypatch.setattr(cuda_norm, "_call", without_mean)
    message = r"a normalisation of \[2, 4, 3, 3\]: an address is missing \(error 1\)"
    with pytest.raises(RuntimeError, match=message):
        emulated.norm_act_forward(*given.forward(), activation="relu", training=True, eps=1e-5)
