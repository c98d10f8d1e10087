"""The Triton kernels of normalisation with its activation, interpreted, equal the reference."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernels.norm_elementwise import (
    assert_backward,
    assert_far_from_zero,
    assert_forward,
    assert_trains,
)

from sparsekern.kernels.backends import triton
from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.backends.reference.norm_act import ACTIVATIONS
from sparsekern.kernels.backends.triton import norm_act
from sparsekern.kernels.backends.triton.norm_elements import RELU, SILU
from sparsekern.kernels.selfcheck.norms import laid_out, problem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous_format", "channels_last")

# Of one element per channel and outer index, and more channels than a tile has; several programs for each
# channel, in both layouts; planes longer than a tile.
SHAPES = ((3, 133, 1, 1), (2, 3, 61, 67), (700, 3, 5, 1))


@pytest.mark.parametrize("layout", [*LAYOUTS, "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_layout(activation: str, dtype: torch.dtype, layout: str) -> None:
    for residual, masked, training in ((True, 0.4, True), (False, 0.0, False)):
        given = problem(
            (3, 5, 5, 3), dtype, "contiguous", activation, residual=residual, masked=masked, training=training
        )
        assert_forward(norm_act, laid_out(given, layout))
        assert_backward(norm_act, laid_out(given, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    given = laid_out(problem(shape, dtype, "contiguous", masked=0.3, seed=1), layout)
    assert_forward(norm_act, given)
    assert_backward(norm_act, given)


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 9), (2, 4, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dimensions_and_what_is_missing(shape: tuple[int, ...], training: bool) -> None:
    given = problem(
        shape, torch.float32, "contiguous", "silu", residual=True, training=training, affine=False
    )
    assert_forward(norm_act, given)
    assert_backward(norm_act, given)


@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_spoilt_gradients_are_not_counted(layout: str, spoiler: float) -> None:
    given = laid_out(problem((4, 8, 5, 5), torch.float32, "contiguous", masked=0.3), layout)
    given.grad[1, 3, 2, 2:4] = spoiler
    assert_backward(norm_act, given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_and_variance_far_from_zero(layout: str) -> None:
    assert_far_from_zero(norm_act, layout)


def test_many_channels_are_merged_and_counted_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_act, "_COUNTED", 4)
    monkeypatch.setattr(norm_act, "_PIECES", 2)
    monkeypatch.setattr(norm_act, "_MERGED", 4)
    given = problem((3, 7, 61, 67), torch.float32, "contiguous", masked=0.3)
    assert_forward(norm_act, given)
    assert_backward(norm_act, given)


def test_a_module_trains_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_trains(triton, monkeypatch)


def test_the_package_does_not_import_these_kernels() -> None:
    code = f"import sys, sparsekern, sparsekern.nn; assert {norm_act.__name__!r} not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_activations_are_those_of_the_reference() -> None:
    assert [reference_norm.ACTIVATIONS[i.value] for i in (RELU, SILU)] == ["relu", "silu"]
