"""Factors of means over channels: powers, products, epsilons, and weights that make up for them.

See ``Average`` and :mod:`sparsekern.graph.rescale`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from sparsekern.graph.propagate.records import Absorbed, Epsilon
from sparsekern.graph.propagate.rules.base import Call
from sparsekern.graph.propagate.values import Affine, Average, Ids, Scale, Value


def raised(average: Average | None, power: float) -> Average | None:
    """The factor of a power of a value.

    Args:
        average: the factor of the value, or None.
        power: the power, not 0.

    Returns:
        The factor, or None.
    """
    return None if average is None else replace(average, exponent=average.exponent * power)


def same_channels(call: Call, left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two dimensions hold equally many slots of the same classes, in any order."""
    a, b = (np.sort(call.slots.find(ids)) for ids in (left, right))
    return np.array_equal(a, b)


def product(call: Call, factors: Iterable[tuple[Value, float]]) -> Average | None:
    """The factor of a product of powers.

    A weight among the factors makes up for it, if it is an affine function of one tensor with one element
    for each channel of the mean.

    Args:
        call: the op.
        factors: values with the powers to which they are raised.

    Returns:
        The factor that is left; None if there is none or a weight makes up for it.
    """
    factors = list(factors)
    found = [raised(v.average, power) for v, power in factors]
    averages = [average for average in found if average is not None]
    if not averages:
        return None
    total = _joined(call, averages)
    if total is None or (total.exponent == 0 and total.epsilons):
        call.lose(*averages)
        return None
    if total.exponent == 0:
        return None
    for value, power in factors:
        if value.affine is not None and power == 1 and _have(call, value.ids, total):
            call.made_up.add(value.affine.tensor)
            call.records.absorbed.append(Absorbed(value.affine, total, call.label))
            return None
    for value, power in factors:
        if value.scale is not None and power == 1 and _have(call, value.scale.ids, total):
            call.made_up.add(value.scale.weight.tensor)
            call.records.absorbed.append(Absorbed(value.scale.weight, total, call.label))
            return None
    return total


def scale(call: Call, factors: Iterable[Value]) -> Scale | None:
    """The weight that a product of values is a multiple of.

    A weight that multiplies before the mean's factor makes up for it, too, as in ``(w * x) * rsqrt(..)``.

    Args:
        call: the op.
        factors: the values.

    Returns:
        The weight; None if there is none with channels, or several, or if it has made up in this op.
    """
    known = [v.scale for v in factors if v.scale is not None]
    known += [Scale(v.affine, v.ids) for v in factors if v.affine is not None and v.tracked]
    return known[0] if len(known) == 1 and known[0].weight.tensor not in call.made_up else None


def _joined(call: Call, averages: list[Average]) -> Average | None:
    """The product of factors; None if they are of different channels."""
    total = averages[0]
    for other in averages[1:]:
        if not same_channels(call, total.ids, other.ids):
            return None
        epsilons = tuple(dict.fromkeys((*total.epsilons, *other.epsilons)))
        total = replace(total, exponent=total.exponent + other.exponent, epsilons=epsilons)
    return total


def _have(call: Call, dims: Iterable[Ids], average: Average) -> bool:
    """Whether one of the dimensions has the channels of ``average``."""
    return any(ids is not None and same_channels(call, ids, average.ids) for ids in dims)


def divided(call: Call, value: Value, number: float) -> Average | None:
    """The factor of a sum over channels that is divided by their number, which is a mean.

    Args:
        call: the op.
        value: the dividend.
        number: the divisor.

    Returns:
        The factor; None if the value is no such sum, or if the number is taken to stay.
    """
    ids = value.total
    if ids is None or number != len(ids) or not call.follows:
        return None
    reason = f"{call.label} divides a sum over channels by their number"
    # The divisor shrinks with the channels, which the check of a smaller copy proves.
    shrinking = Average(ids, -1.0, reason)
    call.records.epsilons.append(Epsilon(call.node, call.module, number, False, call.shape(), shrinking))
    call.records.divisors.append(ids)
    return Average(ids, 1.0, reason)


def summed(call: Call, values: list[Value]) -> Average | None:
    """The factor of a sum of values: theirs, if it is the same for all of them.

    Args:
        call: the op.
        values: the summands.

    Returns:
        The factor; None if there is none or the channels are frozen.
    """
    averages = [value.average for value in values]
    given = [average for average in averages if average is not None]
    if not given:
        return None
    first = given[0]
    alike = len(given) == len(values) and all(
        a.exponent == first.exponent and same_channels(call, a.ids, first.ids) for a in given
    )
    if not alike:
        call.lose(*given)
        return None
    return replace(first, epsilons=tuple(dict.fromkeys(e for a in given for e in a.epsilons)))


def bounded(
    call: Call,
    average: Average | None,
    number: float,
    shape: tuple[int, ...],
    *,
    default: bool = False,
) -> Average | None:
    """The factor of a value to which an epsilon is added, or which is at least an epsilon.

    Args:
        call: the op.
        average: the factor of the value.
        number: the epsilon.
        shape: shape of the value.
        default: whether the op takes it by default.

    Returns:
        The factor, which needs the epsilon to grow with it.
    """
    if average is None or number == 0:
        return average
    index = len(call.records.epsilons)
    call.records.epsilons.append(Epsilon(call.node, call.module, number, default, shape, average))
    return replace(average, epsilons=(*average.epsilons, index))


def affine(value: Value, factor: float, offset: float) -> Affine | None:
    """``factor * value + offset`` as an affine function of a tensor; None if ``value`` is none.

    Args:
        value: a value.
        factor: the factor.
        offset: the offset.

    Returns:
        The function.
    """
    known = value.affine
    if known is None or factor == 0:
        return None
    return Affine(known.tensor, known.factor * factor, known.offset * factor + offset)
