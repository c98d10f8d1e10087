"""Valid calls of every registered op, and ways to spoil an argument; both can be rebuilt from their names.

A call is described by plain data (:class:`Spec`). So it can be built twice, for an op and for the reference,
and repeated from the output of a failed test. Every tensor lies between guard bands.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from sparsekern.kernels.backends.reference import norm_act as reference_norm
from sparsekern.kernels.rows import RowTable

BAND = 16

SHAPES = [((3, 4), 0), ((5,), 0), ((2, 6, 2, 2), 1), ((4, 1, 3), 0), ((2, 2), -1)]
GATES = [[0, 5], [17], [], [3, 2, 5]]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Spoil:
    """One change of one argument: ``index`` says which tensor or number of a list; None for all of it."""

    argument: str
    index: int | None
    how: str


@dataclass(frozen=True)
class Spec:
    """A call: the op, the seed of its valid arguments, whether a valid call precedes it, and its spoils."""

    op: str
    seed: int
    warm: bool
    spoils: tuple[Spoil, ...]


@dataclass
class Arguments:
    """The arguments of one call by name, and the buffers that hold them."""

    given: dict[str, Any]
    buffers: list[Tensor] = field(default_factory=list)
    insides: list[slice] = field(default_factory=list)

    def banded(self, values: Tensor) -> Tensor:
        """The same values and strides in the middle of memory that holds NaN (or -77) around them."""
        span = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
        if values.numel() == 0 or values.dtype is torch.bool:
            span = values.numel()
        poison: Any = torch.nan if values.is_floating_point() else values.dtype is torch.bool or -77
        buffer = torch.full((span + 2 * BAND,), poison, dtype=values.dtype)
        self.buffers.append(buffer)
        self.insides.append(slice(BAND, BAND + span))
        view = buffer.as_strided(values.shape, values.stride(), BAND)
        return view.copy_(values) if values.numel() else view

    def bits(self) -> list[Tensor]:
        return [buffer.view(torch.uint8).clone() for buffer in self.buffers]


def schema(op: str) -> Any:
    return getattr(torch.ops.sparsekern, op).default._schema


def registered() -> list[str]:
    """Every op of the package."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.split("::")[1].split(".")[0] for name in names if name.startswith("sparsekern::"))


def _steps(op: str, draw: random.Random) -> Arguments:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    dtype = draw.choice((*DTYPES, torch.float32, torch.float32))
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, _ in SHAPES]
    tracked = [(p, dim) for p, (_, dim) in zip(params, SHAPES, strict=True) if dim >= 0]
    table = RowTable(tracked, ([0], []), decay=0.9)
    table.threshold.fill_(0.5)
    table.elements.fill_(1)
    table.countdown[2], table.countdown[4] = 0, 3
    table.zero_masked(lambda param: ())
    call = Arguments({})
    lists = {"params": [call.banded(p.detach()) for p in params]}

    def like(name: str) -> None:
        values = [torch.rand(p.shape, generator=generator).to(dtype) for p in params]
        lists[name] = [call.banded(value) for value in values]

    for argument in schema(op).arguments:
        if str(argument.type) == "List[Tensor]" and argument.name not in (
            "params",
            "row_inputs",
            "row_state",
        ):
            like(argument.name)
    if "steps" in lists:
        lists["steps"] = [call.banded(torch.ones(())) for _ in params]
    call.given |= lists
    rows = table.rows_of(params)
    is_tracked = draw.random() < 0.8
    arrays = {"row_inputs": ("penalty", "elements")}
    arrays["row_state"] = ("countdown", "sums", "threshold", "activity", "nonfinite", "pending")
    for name, fields in arrays.items():
        call.given[name] = [call.banded(getattr(table, f)) for f in fields] if is_tracked else []
    call.given |= {"starts": rows.starts, "dims": rows.dims} if is_tracked else {"starts": [], "dims": []}
    call.given |= {"tau": 1.0, "decay": 0.9}
    call.given |= _options(op, draw, call)
    return call


def _options(op: str, draw: random.Random, call: Arguments) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if op != "row_statistics_":
        given["lr"] = 0.01
        if draw.random() < 0.3:
            given["tensor_lr"] = call.banded(torch.tensor(0.01))
    if op in ("sgd_step_", "adam_step_"):
        given |= {"weight_decay": 0.1, "maximize": draw.random() < 0.2}
        if draw.random() < 0.4:
            given["grad_scale"] = call.banded(torch.tensor(2.0))
            given["found_inf"] = call.banded(torch.tensor(0.0))
    if op == "sgd_step_":
        given |= {"momentum": 0.9, "dampening": 0.0, "nesterov": draw.random() < 0.3, "first": False}
    if op == "adam_step_":
        given |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decoupled": draw.random() < 0.5}
        given["amsgrad"] = draw.random() < 0.5
        if not given["amsgrad"]:
            call.given["max_exp_avg_sqs"] = []
    return given


def _channels(op: str, draw: random.Random) -> Arguments:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    tracked = [(Parameter(torch.ones(shape)), dim) for shape, dim in SHAPES if dim >= 0]
    table = RowTable(tracked, GATES)
    for array in (table.sums, table.channel_dot, table.channel_dot_sq):
        array.copy_(torch.randn(array.shape, generator=generator))
    table.pending.fill_(1)
    call = Arguments({"decay": 0.75})
    call.given["gates"] = [call.banded(getattr(table, name)) for name in ("gate_offsets", "gate_rows")]
    state = ("sums", "channel_dot", "channel_dot_sq", "updates", "pending")
    call.given["state"] = [call.banded(getattr(table, name)) for name in state]
    return call


def _norm(op: str, draw: random.Random) -> Arguments:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    shape, dtype = draw.choice([(3, 6, 4, 5), (2, 5), (2, 64, 3, 3)]), draw.choice(DTYPES)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    memory = draw.choice([torch.contiguous_format, torch.channels_last])
    call = Arguments({})

    def data() -> Tensor:
        values = torch.randn(shape, generator=generator).to(dtype)
        return call.banded(values.contiguous(memory_format=memory) if len(shape) == 4 else values)

    def vector(dtype: torch.dtype = compute) -> Tensor:
        return call.banded(torch.rand(shape[1], generator=generator).to(dtype) + 0.5)

    residual = data() if draw.random() < 0.5 else None
    mask = None
    if draw.random() < 0.5:
        mask = call.banded(torch.rand(shape[1], generator=generator) > 0.7)
    call.given = {"x": data(), "residual": residual, "weight": vector(), "bias": vector(), "mask": mask}
    backward = op == "norm_act_backward"
    names = ("mean", "var") if backward else ("running_mean", "running_var")
    call.given |= {name: vector() for name in names}
    counts = [vector(torch.float32), vector(torch.float32), call.banded(torch.ones(1))]
    call.given["counts"] = counts if draw.random() < 0.8 else []
    if backward:
        call.given["grad"] = data()
    activation, training = draw.choice(reference_norm.ACTIVATIONS), draw.random() < 0.5
    numbers = {"eps": 1e-5, "tau": 1.5, "decay": 0.9}
    call.given |= {"activation": activation, "training": training, **numbers}
    return call


VALID: dict[str, Callable[[str, random.Random], Arguments]] = {
    "sgd_step_": _steps,
    "adam_step_": _steps,
    "row_statistics_": _steps,
    "row_mask_": _steps,
    "_channel_moments_": _channels,
    "norm_act": _norm,
    "norm_act_backward": _norm,
}
"""The function that makes a valid call of each op from random numbers."""


def _window(tensor: Tensor) -> Tensor:
    """A tensor with overlapping elements."""
    flat = tensor.reshape(-1)
    strides = [min(1, n - 1) for n in tensor.shape]
    return flat.as_strided(tensor.shape, strides) if flat.numel() > sum(tensor.shape) else flat[:1].expand(3)


def _reversed(tensor: Tensor) -> Tensor:
    return tensor.permute(list(reversed(range(tensor.dim()))))


def _cut(tensor: Tensor) -> Tensor:
    """A tensor whose storage was freed, as in sharded training."""
    cut = tensor.clone()
    cut.untyped_storage().resize_(0)
    return cut


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(tensor)


def _quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "shorter": lambda t: t.reshape(-1)[: max(0, t.numel() - 1)],
    "longer": lambda t: torch.cat([t.reshape(-1)] * 2),
    "one more": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "empty": lambda t: t.new_empty(0),
    "no rows": lambda t: t.new_empty((0, *t.shape[1:])),
    "single": lambda t: t.new_ones(()),
    "one": lambda t: t.new_ones(1),
    "flat": lambda t: t.reshape(-1),
    "one dimension more": lambda t: t.unsqueeze(0),
    "transposed": lambda t: t.reshape(t.shape[::-1]),
    "int": lambda t: t.to(torch.int64),
    "int32": lambda t: t.to(torch.int32),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "double": lambda t: t.double(),
    "float": lambda t: t.float(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "quantised": _quantised,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)]),
    "expanded": lambda t: t.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape),
    "window": _window,
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "reversed memory": lambda t: _reversed(_reversed(t).contiguous()),
    "negated": lambda t: torch._neg_view(t.clone()) if t.is_floating_point() else t,
    "cut": _cut,
    "inference": _inference,
    "fake": _fake,
    "leaf": lambda t: t.detach().clone().requires_grad_(),
    "none": lambda t: None,
    "number": lambda t: 1.5,
    "list": lambda t: [t],
}
"""Values that replace a tensor."""

ALIASES = ("same as", "overlaps")
LISTS = ("without the last", "one more", "doubled", "empty", "none", "a tensor")
NUMBERS: dict[str, Any] = {
    **{repr(v): v for v in (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 0.5, 1.0, 2.0, 1e300)},
    "string": "x",
    "none": None,
}
INTEGERS = (-(2**40), -7, -1, 0, 1, 2, 5, 17, 18, 19, 1000, 2**31, 2**40, 2**62, 2**63 - 1)
STRINGS: dict[str, Any] = {"unknown": "gelu", "nothing": "", "none": None, "number": 3}


def spoils_of(argument: Any, value: Any) -> list[Spoil]:
    """Every change of one argument of a schema whose valid value is ``value``."""
    name, kind = argument.name, str(argument.type)
    if kind == "List[Tensor]":
        found = [Spoil(name, None, how) for how in LISTS]
        hows = (*TENSORS, *ALIASES)
        return found + [Spoil(name, i, how) for i in range(len(value)) for how in hows]
    if "Tensor" in kind:
        return [Spoil(name, None, how) for how in (*TENSORS, *ALIASES)] if value is not None else []
    if kind == "float":
        return [Spoil(name, None, how) for how in NUMBERS]
    if kind == "List[int]":
        found = [Spoil(name, None, how) for how in LISTS[:5]]
        return found + [Spoil(name, i, str(n)) for i in range(len(value)) for n in INTEGERS]
    return [Spoil(name, None, how) for how in STRINGS] if kind == "str" else []
