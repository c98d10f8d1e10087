"""Recurrent layers, whose units go whole: the rows of all gates and the column of the state.

A unit whose rows are zero stays at zero: LSTM adds a share of ``tanh(0)`` to its cell, GRU mixes ``tanh(0)``
into its state, and the state starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from sparsekern.graph.propagate.rules.base import Call, Result, dense, flags, register_rule
from sparsekern.graph.propagate.values import Flags, Ids, Value

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_ZEROS = ("aten::zeros", "aten::new_zeros", "aten::zeros_like")


@register_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrence(call: Call) -> Result:
    """A recurrence from a state of zeros. All layers and directions have the same units."""
    x, weights = call["input"], call["params"]
    if call.overload != "input" or not _starts_at_zero(call):
        return call.give_up(f"{call.label} runs a recurrence from a state that may not be zero")
    layers, ways = call["num_layers"], 2 if call["bidirectional"] else 1
    per = len(weights) // (layers * ways)
    size = weights[1].shape[1]
    if per != (4 if call["has_biases"] else 2) or not all(w.static for w in weights):
        return call.give_up(f"{call.label} has projections, or weights computed from activations")
    gates = _GATES[call.name]
    units = dense(weights[1].ids[1], size)
    stays = next((w.untracked_reason for w in weights if w.untracked_reason), "")
    reason = stays or f"{call.label} keeps its units"
    _follow_units(call, units)
    zero, made = np.ones(size, bool), frozenset[int]()
    for number in range(0, len(weights), per):
        own = weights[number : number + per]
        for weight in own:
            call.unify(np.tile(units, gates), weight.ids[0], gates * size, reason)
            zero &= flags(weight.zero[0], gates * size).reshape(gates, size).all(0)
            made |= call.produce("dense", weight.ids[0], None)
        call.unify(units, own[1].ids[1], size, reason)
        if number < per * ways:
            call.contract(x, x.ndim - 1, own[0], 1)
        else:
            call.unify(np.tile(units, ways), own[0].ids[1], ways * size, reason)
        for weight in own[:2]:
            if weight.ids[1] is not None:
                call.records.consume(weight.ids[1])
        _count(call, x, own[:2])
    for producer in made:
        call.records.producers[producer].consumed = True
    return _outputs(call, x, np.tile(units, ways), np.tile(zero, ways), made)


def _outputs(call: Call, x: Value, ids: np.ndarray, zero: np.ndarray, made: frozenset[int]) -> Result:
    """The sequence of states, and the last states; states are per direction."""
    parts = []
    for index, (shape, _) in enumerate(call.outputs):
        size = shape[-1]
        none: Sequence[None] = [None] * (len(shape) - 1)
        own: list[Ids] = [*none, ids[:size]]
        truth: list[Flags] = [*none, zero[:size]]
        parts.append(call.make(own, truth, index=index, origins=made))
    for dim, leading in enumerate(x.ids[:-1]):
        call.freeze(leading, f"{call.label} runs along dimension {dim}")
    return tuple(parts)


def _count(call: Call, x: Value, weights: Sequence[Value]) -> None:
    positions = [call.size(x, dim) for dim in range(x.ndim - 1)]
    for weight in weights:
        call.count_macs(1, *positions, call.size(weight, 0), call.size(weight, 1))


def _states(call: Call) -> list[Any]:
    """The nodes of the states before the first step."""
    given = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs.get("hx")
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _starts_at_zero(call: Call) -> bool:
    """Whether the states before the first step are made of zeros for this op alone."""
    return all(
        isinstance(state, fx.Node)
        and set(state.users) == {call.node}
        and isinstance(state.target, torch._ops.OpOverload)
        and state.target._schema.name in _ZEROS
        for state in _states(call)
    )


def _follow_units(call: Call, units: np.ndarray) -> None:
    """Let the zeros have as many elements as there are units. The check of a smaller copy proves it."""
    for state in _states(call):
        value = call.records.values.get(state)
        if isinstance(value, Value):
            none = (None,) * (value.ndim - 1)
            truth = np.ones(len(units), bool)
            call.records.values[state] = replace(value, ids=(*none, units), zero=(*none, truth))
