"""Spoilt calls of every registered op, made in child processes, so that a crash is found."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import random
import re
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from kernels.op_calls import (
    ALIASES,
    LISTS,
    NUMBERS,
    STRINGS,
    TENSORS,
    VALID,
    Arguments,
    Spec,
    Spoil,
    registered,
    schema,
    spoils_of,
)
from torch import Tensor

from sparsekern.kernels import memory as _memory
from sparsekern.kernels import norm_ops
from sparsekern.kernels import ops as _ops
from sparsekern.kernels.backends import reference
from sparsekern.kernels.counts import ChannelCounts
from sparsekern.kernels.options import LISTS as LISTS_OF_OPS
from sparsekern.kernels.options import NAMES, Moments, NormInputs, NormOptions, Running
from sparsekern.kernels.rows import ChannelArrays

OURS = re.compile(r"^[\w.\[\]]+(, \w+)?: got .+, expected ", re.DOTALL)

# A few roundings of the dtype, for numbers of about 10.
NEAR = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}


def drawn(seed: int) -> Spec:
    """A random call; every second one has its argument spoilt twice."""
    draw = random.Random(seed)
    op = draw.choice(registered())
    call_seed = draw.randrange(1 << 30)
    given = VALID[op](op, random.Random(call_seed)).given
    arguments = [argument for argument in schema(op).arguments if argument.name in given]
    # The argument is drawn first, because a list of tensors has many more spoils than a number.
    ways = [spoils for a in arguments if (spoils := spoils_of(a, given[a.name]))]
    spoils = [draw.choice(draw.choice(ways)) for _ in range(draw.choice((1, 1, 2)))]
    return Spec(op, call_seed, draw.random() < 0.5, tuple(spoils))


def every_single() -> list[Spec]:
    """Each spoil of each argument of each op alone, on one valid call, before and after a valid one."""
    found = []
    for op in registered():
        given = VALID[op](op, random.Random(1)).given
        for argument in schema(op).arguments:
            for spoil in spoils_of(argument, given.get(argument.name)):
                found += [Spec(op, 1, warm, (spoil,)) for warm in (False, True)]
    return found


def apply(call: Arguments, spoil: Spoil, draw: random.Random) -> None:
    """Spoil one argument."""
    value = call.given.get(spoil.argument)
    if value is None or (spoil.index is not None and spoil.index >= len(value)):
        return
    if spoil.index is None and isinstance(value, list):
        call.given[spoil.argument] = _list(value, spoil.how)
    elif spoil.index is None:
        call.given[spoil.argument] = _one(call, value, spoil, draw)
    else:
        entry = value[spoil.index]
        value[spoil.index] = int(spoil.how) if isinstance(entry, int) else _one(call, entry, spoil, draw)


def _list(value: list[Any], how: str) -> Any:
    if how not in LISTS:
        return value
    extra = [value[0].clone() if isinstance(value[0], Tensor) else 0] if value else []
    return {
        "without the last": value[:-1],
        "one more": value + extra,
        "doubled": value[:1] * len(value),
        "empty": [],
        "none": [*value[:-1], None],
        "a tensor": torch.ones(2),
    }[how]


def _one(call: Arguments, value: Any, spoil: Spoil, draw: random.Random) -> Any:
    how = spoil.how
    if isinstance(value, str):
        return STRINGS.get(how, value)
    if isinstance(value, (int, float)):
        return NUMBERS.get(how, value)
    if not _is_plain(value) or how not in (*TENSORS, *ALIASES):
        return value
    if how in ALIASES:
        return _alias(call, value, how, draw)
    try:
        spoilt = TENSORS[how](value)
    except (RuntimeError, NotImplementedError, TypeError):
        return value  # there is no such tensor
    special = ("negated", "cut", "inference", "leaf", "window", "expanded", "gaps", "nested", "quantised")
    if not _is_plain(spoilt) or spoilt.device.type != "cpu" or how in special or _memory.repeats(spoilt):
        return spoilt
    return call.banded(spoilt) if spoilt.numel() else spoilt


def _alias(call: Arguments, value: Tensor, how: str, draw: random.Random) -> Tensor:
    """Another tensor of the call, of this shape if there is one; or one that lies half in its memory."""
    flat = [t for v in call.given.values() for t in (v if isinstance(v, list) else [v])]
    others = [t for t in flat if t is not value and _is_plain(t)]
    same = [t for t in others if t.shape == value.shape and t.dtype is value.dtype]
    if not same:
        return draw.choice(others)
    other = draw.choice(same)
    if how == "same as" or value.numel() < 2:
        return other
    at = next((i for i, b in enumerate(call.buffers) if _lies_in(other, b)), None)
    if at is None:
        return other
    shift = max(0, other.storage_offset() - value.numel() // 2)
    return call.buffers[at].as_strided(value.shape, value.stride(), shift)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that can be spoilt further."""
    strided = type(value) is Tensor and value.layout is torch.strided
    if not strided or value.is_nested or value.is_quantized:
        return False
    # Torch reads memory that was given back.
    return value.numel() == 0 or value.untyped_storage().nbytes() > 0


def _lies_in(tensor: Tensor, buffer: Tensor) -> bool:
    return tensor.untyped_storage()._cdata == buffer.untyped_storage()._cdata


def through_op(op: str, given: dict[str, Any]) -> Any:
    return getattr(torch.ops.sparsekern, op).default(**given)


def by_reference(op: str, given: dict[str, Any]) -> Any:
    """The result of the reference for the same arguments, without checks."""
    given = dict(given)
    if op == "_channel_moments_":
        return reference.channel_moments_(
            ChannelArrays._make([*given["gates"], *given["state"], given["decay"]])
        )
    if op.startswith("norm_act"):
        inputs = NormInputs(*(given[name] for name in NormInputs._fields))
        options = NormOptions(given["activation"], given["training"], given["eps"])
        with torch.no_grad():
            if op == "norm_act":
                running = Running(given["running_mean"], given["running_var"])
                return reference.norm_act_forward(inputs, running, options)
            arrays = given["counts"]
            counts = ChannelCounts.of(arrays, given["tau"], given["decay"]) if arrays else None
            of_pass = (Moments(given["mean"], given["var"]), options, counts)
            return reference.norm_act_backward(given["grad"], inputs, *of_pass)
    number = NAMES.index(op)
    lists = tuple(given.pop(name) for name in LISTS_OF_OPS[number])
    return reference.step_(number, lists, *_ops._gathered(number, given))


def problem_with(spec: Spec) -> str | None:
    """The fault of an op in a call; None if it refused the call or gave the reference's results."""
    call, twin = _made(spec, through_op), _made(spec, by_reference)
    before = call.bits()
    try:
        with torch.no_grad():
            found = through_op(spec.op, call.given)
    except (ValueError, TypeError, RuntimeError) as error:
        return _problem_with_error(spec, error, call, before)
    except Exception as error:
        return f"raises {error!r}"
    if any(_is_unreal(t) for t in _tensors(call.given)):
        same = torch.equal(_joined(before), _joined(call.bits()))
        return None if same else "has written though a tensor is fake"
    found_inf = call.given.get("found_inf")
    if isinstance(found_inf, Tensor) and bool(found_inf == 1):
        same = torch.equal(_joined(before), _joined(call.bits()))
        return None if same else "has written though found_inf is 1"
    # Torch writes to inference tensors in inference mode only.
    inference = any(tensor.is_inference() for tensor in _tensors(twin.given))
    try:
        with torch.inference_mode(inference):
            want = by_reference(spec.op, twin.given)
    except Exception as error:
        return f"is done, and the reference raises {error!r}"
    return _difference(call, twin, found, want, before)


def _made(spec: Spec, run: Callable[[str, dict[str, Any]], Any]) -> Arguments:
    call = VALID[spec.op](spec.op, random.Random(spec.seed))
    if spec.warm:
        with torch.no_grad():
            run(spec.op, call.given)
    for number, spoil in enumerate(spec.spoils):
        apply(call, spoil, random.Random(spec.seed + number))
    return call


def _problem_with_error(spec: Spec, error: Exception, call: Arguments, before: list[Tensor]) -> str | None:
    text = str(error)
    names = [argument.name for argument in schema(spec.op).arguments]
    of_torch = f"sparsekern::{spec.op}" in text or any(f"argument '{name}'" in text for name in names)
    # Torch cannot make these tensors fake, or print them in a message of its own.
    of_torch |= type(error).__name__ == "UnsupportedFakeTensorException" or text.startswith("setStorage")
    if not (OURS.match(text) or of_torch):
        return f"names no argument: {error!r}"
    if not torch.equal(_joined(before), _joined(call.bits())):
        return f"has changed something before {error!r}"
    return None


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    flat = [t for v in given.values() for t in (v if isinstance(v, list) else [v])]
    return [t for t in flat if isinstance(t, Tensor)]


def _is_unreal(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor" or tensor.device.type == "meta"


def _joined(bits: Sequence[Tensor]) -> Tensor:
    return torch.cat([b.reshape(-1) for b in bits])


def _difference(call: Arguments, twin: Arguments, found: Any, want: Any, before: list[Tensor]) -> str | None:
    for buffer, inside, old in zip(call.buffers, call.insides, before, strict=False):
        bands = buffer.view(torch.uint8).clone()
        size = buffer.element_size()
        bands[inside.start * size : inside.stop * size] = old[inside.start * size : inside.stop * size]
        if not torch.equal(bands, old):
            return "has written around a tensor"
    pairs = list(zip(call.buffers, twin.buffers, strict=True))
    pairs += list(zip(_tensors(call.given), _tensors(twin.given), strict=True))
    if found is not None:
        results = [(mine, other) for mine, other in zip(found, want, strict=True) if other is not None]
        pairs += results
    for mine, other in pairs:
        if mine.layout is torch.strided and not _is_near(mine.detach(), other.detach()):
            return f"gives {mine}, and the reference {other}"
    return None


def _is_near(mine: Tensor, other: Tensor) -> bool:
    if mine.dtype is not other.dtype or mine.shape != other.shape:
        return False
    if not mine.is_floating_point():
        return torch.equal(mine, other)
    near = NEAR.get(mine.dtype, 0.3)
    return torch.allclose(mine.double(), other.double(), rtol=near, atol=near, equal_nan=True)


def problems(specs: Sequence[Spec], backend: Any = None) -> list[str]:
    """The faults of the ops in these calls, each found in a forked process that may crash."""
    found: list[str] = []
    start = 0
    # A child would write the parent's buffered output again.
    sys.stdout.flush()
    while start < len(specs):
        done, texts, status = _in_a_fork(specs[start:], backend)
        found += [f"{specs[start + i]}: {text}" for i, text in texts]
        start += done
        if status != 0 and start < len(specs):
            found.append(f"{specs[start]}: ends the process ({status})")
            start += 1
    return found


def _in_a_fork(specs: Sequence[Spec], backend: Any) -> tuple[int, list[tuple[int, str]], int]:
    """Returns the number of calls made, their faults by number, and the exit of the process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            _run(specs, backend, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    results = []
    while data:
        (length,) = struct.unpack_from("I", data)
        results.append(pickle.loads(data[4 : 4 + length]))
        data = data[4 + length :]
    return len(results), [(i, text) for i, text in enumerate(results) if text is not None], status


def _run(specs: Sequence[Spec], backend: Any, writing: int) -> None:
    # Threads do not survive a fork. The parent reports a crash.
    torch.set_num_threads(1)
    # The collector must not end objects of the parent: sessions of ONNX Runtime wait for their threads.
    gc.freeze()
    faulthandler.disable()
    with ExitStack() as stack:
        if backend is not None:
            for module in (_ops, norm_ops):
                stack.enter_context(patch.object(module, "choose", lambda device: backend))
        for spec in specs:
            try:
                problem = problem_with(spec)
            except Exception as error:
                problem = f"cannot be judged: {error!r}"
            text = pickle.dumps(problem)
            os.write(writing, struct.pack("I", len(text)) + text)
