"""The arguments of the ops: the lists of a step, its hyperparameters, and the operands of a normalisation.

A hyperparameter is a field of one class in this file. The rest follows from the fields: the schemas of the
ops (:mod:`sparsekern.kernels.ops`), the values that an optimizer reads from a parameter group
(:mod:`sparsekern.optim.options`), and the order of the numbers in native code (:data:`HYPER`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from sparsekern.kernels import checks
from sparsekern.kernels.rows import Table

_INF = float("inf")

SGD, ADAM, STATISTICS, MASK = range(4)
"""Numbers of the ops of a step, as in csrc/abi.h; index of the tuples below."""

NAMES = ("sgd_step_", "adam_step_", "row_statistics_", "row_mask_")
"""Names of the ops in ``torch.ops.sparsekern``."""

Lists = tuple[Sequence[Tensor], ...]
"""Lists of tensors of one call; entry ``i`` of each list belongs to parameter ``i``."""

LISTS: tuple[tuple[str, ...], ...] = (
    ("params", "grads", "momentum_buffers"),
    ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps"),
    ("params", "grads"),
    ("params",),
)
"""Names of the lists of each op, in the order of ``Slot`` in csrc/abi.h."""

STEPS = LISTS[ADAM].index("steps")
"""Position of the step counters among the lists of Adam."""

OPTIONAL = {
    "momentum_buffers": ("momentum", "momentum is not 0"),
    "max_exp_avg_sqs": ("amsgrad", "amsgrad is set"),
}
"""Lists that are empty unless an option is set: the name of the option, and the condition in words."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Hyperparameters that SGD and Adam share.

    Attributes:
        lr: learning rate; a float, or a one-element tensor on the device of the parameters.
        weight_decay: factor of the parameter that is added to the gradient.
        maximize: whether the step follows the gradient upwards.

    Raises:
        TypeError, ValueError: a number is not finite or out of range; the message names the field.
    """

    lr: float | Tensor
    weight_decay: float = 0.0
    maximize: bool = False

    def __post_init__(self) -> None:
        _check_finite(self)


@dataclass(frozen=True, kw_only=True)
class SgdOptions(StepOptions):
    """Hyperparameters of ``torch.optim.SGD``.

    Attributes:
        momentum: weight of the old momentum buffer; 0 for no buffers.
        dampening: the gradient enters the buffer with the weight ``1 - dampening``.
        nesterov: whether the update uses the gradient plus ``momentum`` times the buffer.
        first: whether the buffers are new. New buffers become the gradient, without dampening, as in torch.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    first: bool = False


@dataclass(frozen=True, kw_only=True)
class AdamOptions(StepOptions):
    """Hyperparameters of ``torch.optim.Adam`` and ``torch.optim.AdamW``.

    Attributes:
        beta1, beta2: decay of the running means of the gradient and of its square, in [0, 1).
        eps: added to the root of the mean square, at least 0.
        decoupled: whether weight decay and penalties shrink the parameter (AdamW), not the gradient.
        amsgrad: whether the largest mean square so far takes the place of the current one.
    """

    beta1: float
    beta2: float
    eps: float
    decoupled: bool = False
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check_finite(self)
        checks.adam(self.beta1, self.beta2, self.eps)


@dataclass(frozen=True)
class StatisticsOptions:
    """Options of the op that only takes statistics: none."""

    # A step with rate 0 takes no statistics, so the backends get a rate that is not 0.
    lr: ClassVar[float] = 1.0


@dataclass(frozen=True)
class MaskOptions:
    """Options of the op that only applies penalty, fade-out and mask.

    Attributes:
        lr: learning rate of the optimizer's step, as in :class:`StepOptions`; 0 only applies the mask.
    """

    lr: float | Tensor

    # Penalties shrink the parameter, because the optimizer has made its step.
    decoupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_finite(self)


Options = SgdOptions | AdamOptions | StatisticsOptions | MaskOptions

_WithRate = TypeVar("_WithRate", bound=Options)

OPTIONS: tuple[type[Any], ...] = (SgdOptions, AdamOptions, StatisticsOptions, MaskOptions)
"""Class of the options of each op."""

FIELDS: tuple[dict[str, str], ...] = tuple({f.name: str(f.type) for f in fields(kind)} for kind in OPTIONS)
"""Names and types (``"float"``, ``"bool"`` or ``"float | Tensor"``) of the options of each op."""

_FINITE = {
    kind: tuple(name for name, type_ in found.items() if type_ != "bool")
    for kind, found in zip(OPTIONS, FIELDS, strict=True)
}


def _check_finite(options: Any) -> None:
    """Check that the numbers are finite. Ops check a tensor, and read it only on a CPU.

    Raises:
        ValueError: a number is not finite.
    """
    for name in _FINITE[type(options)]:
        value = getattr(options, name)
        if not isinstance(value, Tensor):
            checks.finite(name, value)


def with_rate(options: _WithRate, lr: float | Tensor) -> _WithRate:
    """The same options with another learning rate.

    A schedule changes the rate at every step, and ``dataclasses.replace`` takes longer than a small step.

    Raises:
        TypeError, ValueError: the rate is no finite number.
    """
    if type(lr) is not float or not -_INF < lr < _INF:
        _check_rate(lr)
    made = object.__new__(type(options))
    values = made.__dict__
    values.update(options.__dict__)
    values["lr"] = lr
    return made


def _check_rate(lr: float | Tensor) -> None:
    """Check that a learning rate is a tensor or a finite number."""
    if not isinstance(lr, Tensor):
        checks.finite("lr", lr)


def _hyper(types: Sequence[str]) -> tuple[list[str], ...]:
    """Fields of these types, in three lists: those that SGD and Adam share, those of SGD, those of Adam."""
    shared = {field.name for field in fields(StepOptions)}
    own = [[name for name, type_ in FIELDS[op].items() if type_ in types] for op in (SGD, ADAM)]
    both = [name for name in own[SGD] if name in shared]
    return (both, *([name for name in names if name not in shared] for names in own))


_NUMBERS, _FLAGS = _hyper(("float", "float | Tensor")), _hyper(("bool",))

NUMBERS = (*_NUMBERS[0], *_NUMBERS[1], *_NUMBERS[2], "grad_scale", "tau", "decay")
"""Numbers in ``Hyper`` of csrc/abi.h, in its order; the last three belong to the call and to the table."""

FLAGS = (*_FLAGS[1], *_FLAGS[2], *_FLAGS[0], "scaled")
"""Flags in ``Hyper`` of csrc/abi.h, in its order; ``scaled`` tells whether ``grad_scale`` is used."""

HYPER = NUMBERS + FLAGS
"""Names in ``Hyper`` of csrc/abi.h, in its order. A compiled core with another order is not used."""

_OF_CALL = ("grad_scale", "tau", "decay", "scaled")


def _reader(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that returns the attributes of an object as a tuple."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda options: tuple(getattr(options, name) for name in names)


def _packing(kind: type[Any]) -> tuple[Callable[[Any], tuple[Any, ...]], Callable[[Any], tuple[Any, ...]]]:
    """A function that reads the hyperparameters of ``kind``, and one that puts them in the order of HYPER."""
    names = [name for name in HYPER if name in FIELDS[OPTIONS.index(kind)] or hasattr(kind, name)]
    known = [*names, *_OF_CALL]
    # The entry behind all others is 0. It stands for what the op does not have.
    return _reader(names), itemgetter(*(known.index(name) if name in known else len(known) for name in HYPER))


_PACKINGS = tuple(map(_packing, OPTIONS))


def hyper(op: int, options: Any, table: Table | None, grad_scale: float | None = None) -> tuple[Any, ...]:
    """The values of a call in the order of :data:`HYPER`.

    Args:
        op: number of the op.
        options: its options. A rate that is a tensor counts as 0, because kernels read it on their device.
        table: the table of the call, or None.
        grad_scale: the number by which gradients are divided, or None.

    Returns:
        The values; 0 for a name that the op does not have.
    """
    read, place = _PACKINGS[op]
    tau, decay = (1.0, 0.0) if table is None else (table.tau, table.decay)
    scale, scaled = (1.0, False) if grad_scale is None else (grad_scale, True)
    values: tuple[Any, ...] = place((*read(options), scale, tau, decay, scaled, 0))
    return (0.0, *values[1:]) if isinstance(values[0], Tensor) else values


class Scaling(NamedTuple):
    """What ``torch.amp.GradScaler`` hands to a step.

    Attributes:
        grad_scale: one element by which gradients are divided; None for no scale.
        found_inf: one element, 1 to skip the step; None for a step that is always made.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


UNSCALED = Scaling()
"""A step without ``GradScaler``."""


def named(op: int, lists: Lists) -> dict[str, Sequence[Tensor]]:
    """The lists of an op, keyed by their names."""
    return dict(zip(LISTS[op], lists, strict=True))


def read_lists(op: int, scaled: bool) -> tuple[str, ...]:
    """Names of the lists that an op only reads. With a gradient scale the gradients are written."""
    if op == STATISTICS:
        return LISTS[STATISTICS]
    return () if scaled or op == MASK else ("grads",)


class NormInputs(NamedTuple):
    """The tensors that both passes of a normalisation read, in the order of the native functions.

    Attributes:
        x: ``[N, C, ...]``; float32, float64, bfloat16 or float16.
        residual: like ``x``; added before the activation. None for none.
        weight: gamma ``[C]``; None for 1.
        bias: beta ``[C]``; None for 0.
        mask: bool ``[C]``; True for a masked channel. Its ``x`` is not read. None for no masked channel.
    """

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None


class Running(NamedTuple):
    """The running statistics of a normalisation, ``[C]``; written in training.

    Attributes:
        mean: running mean, or None.
        var: running (unbiased) variance, or None.
    """

    mean: Tensor | None = None
    var: Tensor | None = None


class Moments(NamedTuple):
    """The statistics that a forward pass normalised by, ``[C]`` in the compute type.

    Attributes:
        mean: mean of each channel.
        var: biased variance of each channel.
    """

    mean: Tensor
    var: Tensor


class NormOptions(NamedTuple):
    """Options of a normalisation.

    Attributes:
        activation: one of :data:`~sparsekern.kernels.activations.ACTIVATIONS`.
        training: whether ``x`` is normalised by the mean and the (biased) variance of the batch.
        eps: added to the variance.
        momentum: weight of the batch in the update of the running statistics, in training; 0 for no update.
    """

    activation: str
    training: bool
    eps: float
    momentum: float = 0.0
