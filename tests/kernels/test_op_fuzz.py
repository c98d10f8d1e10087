"""Every registered op refuses a bad argument by name and changes nothing, or equals the reference.

``SPARSEKERN_FUZZ=20000`` makes 20,000 random calls instead of a few hundred, and also applies each change of
each argument alone.
"""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest.mock import patch

import pytest
import torch
from kernels import op_fuzz
from kernels.op_calls import VALID, Spec, Spoil, registered
from kernels.op_fuzz import drawn, every_single, problems
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekern.kernels import native as _native
from sparsekern.kernels.backends import reference

COUNT = int(os.environ.get("SPARSEKERN_FUZZ", "0"))

# Torch's own warnings about odd tensors, and about a fork with threads, which the child does not use.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

native = pytest.mark.skipif(_native.load() is None, reason="the native kernels are not built")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="a crash is found in a forked process")


def test_every_op_has_valid_calls() -> None:
    assert registered() == sorted(VALID)


@forks
@native
def test_refused_or_done() -> None:
    specs = [drawn(seed) for seed in range(COUNT or 350)]
    assert problems(specs + (every_single() if COUNT else [])) == []


@forks
def test_reference_refuses_or_does() -> None:
    assert problems([drawn(seed) for seed in range(10_000, 10_000 + (COUNT or 150))], reference) == []


@pytest.mark.parametrize("op", sorted(VALID))
def test_valid_calls_are_done(op: str) -> None:
    """The control: unspoilt calls succeed."""
    for seed in range(4):
        for warm in (False, True):
            assert op_fuzz.problem_with(Spec(op, seed, warm, ())) is None
        given = VALID[op](op, op_fuzz.random.Random(seed)).given
        with torch.no_grad():
            op_fuzz.through_op(op, given)


@forks
def test_a_crash_a_wrong_result_and_a_nameless_error_are_found() -> None:
    """The control of the search itself."""
    specs = [Spec("row_mask_", seed, False, ()) for seed in range(3)]

    def spoilt(op: str, given: dict[str, Any]) -> None:
        kind = spoilt.calls = spoilt.calls + 1  # type: ignore[attr-defined]
        if kind == 1:
            given["params"][0].add_(1)
        elif kind == 2:
            raise ValueError("no name")
        else:
            os.kill(os.getpid(), signal.SIGSEGV)

    spoilt.calls = 0  # type: ignore[attr-defined]
    with patch.object(op_fuzz, "through_op", spoilt):
        found = problems(specs)
    assert [text.split("): ")[-1].split(" ")[0] for text in found] == ["gives", "names", "ends"]


WRONG = [
    Spoil("x", None, "int"),
    Spoil("weight", None, "one more"),
    Spoil("counts", 0, "shorter"),
    Spoil("params", 0, "int"),
    Spoil("params", 1, "longer"),
    Spoil("row_state", 1, "flat"),
    Spoil("gates", 0, "shorter"),
]


@pytest.mark.parametrize("op", sorted(VALID))
def test_fake_tensors_are_checked(op: str) -> None:
    """Errors are raised during tracing, not when the traced program runs."""
    given = VALID[op](op, op_fuzz.random.Random(3)).given
    of_op = [spoil for spoil in WRONG if given.get(spoil.argument) not in (None, [])]
    assert of_op
    for spoil in [None, *of_op]:
        call = VALID[op](op, op_fuzz.random.Random(3))
        if spoil is not None:
            op_fuzz.apply(call, spoil, op_fuzz.random.Random(0))
        with FakeTensorMode() as mode:
            fake = {name: _faked(mode, value) for name, value in call.given.items()}
            if spoil is None:
                op_fuzz.through_op(op, fake)
                continue
            with pytest.raises((ValueError, TypeError), match=": got .*expected"):
                op_fuzz.through_op(op, fake)


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, list):
        return [_faked(mode, entry) for entry in value]
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def test_a_compiled_call_with_a_wrong_shape_is_refused() -> None:
    given = VALID["norm_act"]("norm_act", op_fuzz.random.Random(3)).given | {"weight": torch.ones(3)}
    torch._dynamo.reset()
    compiled = torch.compile(lambda: op_fuzz.through_op("norm_act", given), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"weight: got .*\[3\].*expected"):
        compiled()
