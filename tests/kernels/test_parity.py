"""Every way to compute a step equals the reference: results, state and every side effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.tolerance import assert_equal_step

from sparsekern.kernels import backends
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.rows import ChannelArrays
from sparsekern.kernels.selfcheck.calls import OPS, Op
from sparsekern.kernels.selfcheck.problems import DTYPES, LAYOUTS, ROW_LENGTHS, ROW_STATES, Problem, problem

# The dispatcher is another route to the reference: it takes the arguments apart and puts them together again.
ROUTES = ["dispatcher", *(name for name, works, _ in backends.available() if works)]
ROUTES.remove("reference")
if "triton" in ROUTES:
    # A step takes 1 s in triton's interpreter; tests/triton covers it.
    ROUTES.remove("triton")


@pytest.fixture(params=ROUTES)
def route(
    request: pytest.FixtureRequest, force_backend: Callable[[str], None]
) -> Callable[[Op, Problem], None]:
    if request.param == "dispatcher":
        force_backend("reference")
        return _through_dispatcher
    force_backend(request.param)
    return lambda op, on: op.call(_ops, on)


def _through_dispatcher(op: Op, on: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "traced", lambda tensor: True)
        op.call(_ops, on)


def _compare(route: Callable[[Op, Problem], None], op: Op, want: Problem, steps: int) -> None:
    """Both start each step from the same state, so differences do not accumulate."""
    got = want.clone()
    if route is _through_dispatcher:
        # One step suffices to test how the arguments are passed; the arithmetic is the reference's own.
        steps = 1
    for _ in range(steps):
        before = want.clone()
        op.call(reference, want)
        route(op, got)
        assert_equal_step(got, want, before)
        got.copy_(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_op(route: Callable[[Op, Problem], None], name: str, dtype: torch.dtype) -> None:
    want = problem(dtype, "contiguous", "some masked, some fading", seed=1)
    _compare(route, OPS[name], want, steps=3)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize(
    "name", ["sgd momentum", "sgd scaled", "adamw amsgrad", "adamw scaled", "statistics", "mask"]
)
def test_layout(route: Callable[[Op, Problem], None], name: str, layout: str) -> None:
    want = problem(torch.float32, layout, "some masked, some fading", seed=2)
    _compare(route, OPS[name], want, steps=2)


@pytest.mark.parametrize("row_state", ROW_STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd nesterov", "adam decay maximize", "statistics", "mask"])
def test_row_state(
    route: Callable[[Op, Problem], None], name: str, dtype: torch.dtype, row_state: str
) -> None:
    _compare(route, OPS[name], problem(dtype, "channels_last", row_state, seed=3), steps=4)


@pytest.mark.parametrize("row_state", ["all live", "some masked, some fading"])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_row_length(
    route: Callable[[Op, Problem], None], name: str, dtype: torch.dtype, penalised: bool, row_state: str
) -> None:
    want = problem(dtype, "contiguous", row_state, seed=7, shapes=ROW_LENGTHS)
    if not penalised:
        want.arrays["penalty"].view.zero_()
    _compare(route, OPS[name], want, steps=2)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw amsgrad", "statistics"])
@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), 1e30])
def test_spoilt_gradients(route: Callable[[Op, Problem], None], name: str, spoiler: float) -> None:
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=4)
    for guarded in want.tensors["grads"]:
        if guarded.view.numel() > 4:
            guarded.view.view(-1)[[1, -2]] = spoiler
    _compare(route, OPS[name], want, steps=2)


@pytest.mark.parametrize("penalised", [0, 1, 2], ids=["none", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sgd", "sgd scaled", "adam", "adam amsgrad maximize"])
def test_infinite_weights(
    route: Callable[[Op, Problem], None], name: str, dtype: torch.dtype, penalised: int
) -> None:
    """They stay infinite where nothing decays (0 times infinity is NaN), whatever the other rows do."""
    want = problem(dtype, "contiguous", "some masked, some fading", seed=8, shapes=ROW_LENGTHS)
    penalty = want.arrays["penalty"].view
    penalty.copy_(torch.arange(len(penalty)) % 2 if penalised == 1 else torch.tensor(penalised / 2))
    for guarded in want.tensors["params"]:
        guarded.view.view(-1)[::3] = float("inf")
    _compare(route, OPS[name], want, steps=2)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "statistics"])
def test_expanded_gradients(route: Callable[[Op, Problem], None], name: str) -> None:
    """Gradients with all strides 0, as the backward pass of a sum makes them."""
    want = problem(torch.float32, "channels_last", "all live", seed=5)
    got = want.clone()
    for on in (want, got):
        for guarded in on.tensors["grads"]:
            guarded.view = torch.ones(()).expand(guarded.view.shape)
    before = want.clone()
    OPS[name].call(reference, want)
    route(OPS[name], got)
    for on in (want, got, before):
        del on.tensors["grads"]
    assert_equal_step(got, want, before)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw amsgrad", "statistics"])
def test_list_without_rows(route: Callable[[Op, Problem], None], name: str) -> None:
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=6)
    want.starts = [-1] * len(want.starts)
    _compare(route, OPS[name], want, steps=2)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw scaled", "statistics", "mask"])
def test_the_default_device_does_not_matter(route: Callable[[Op, Problem], None], name: str) -> None:
    """Tensors on the CPU, while new tensors without a device are made elsewhere."""
    want = problem(torch.float32, "contiguous", "some masked, some fading", seed=9)
    got, before = want.clone(), want.clone()
    OPS[name].call(reference, want)
    with torch.device("meta"):
        route(OPS[name], got)
    assert_equal_step(got, want, before)


@pytest.mark.parametrize("pending", [0.0, 1.0])
def test_channel_moments(
    force_backend: Callable[[str], None],
    pending: float,
) -> None:
    """Channels with zero, one, two and many gates, on all working backends."""
    generator = torch.Generator().manual_seed(7)
    counts = torch.tensor([0, 1, 2, 2, 0, 500, 1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    gates = torch.randint(0, 40, (int(offsets[-1]),), generator=generator)
    results = {}
    for name, works, _ in backends.available():
        if not works:
            continue
        generator.manual_seed(8)
        sums = torch.randn(40, 4, generator=generator)
        mean, square = torch.randn(2, 7, generator=generator)
        arrays = ChannelArrays(
            offsets,
            gates,
            sums,
            mean,
            square.abs(),
            torch.tensor(5.0),
            torch.tensor(pending),
            0.9,
        )
        force_backend(name)
        _ops.channel_moments_(arrays)
        results[name] = arrays
    want = results["reference"]
    for got in results.values():
        # 500 terms of size 1 in another order.
        torch.testing.assert_close(got[:-1], want[:-1], rtol=1e-5, atol=1e-5)
