"""Recurrent layers. Their state feeds back through gates whose rows are not separate channels."""

from __future__ import annotations

from sparsekern.graph.propagate.rules.base import Call, Result, register_rule


@register_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrence(call: Call) -> Result:
    """A recurrence freezes its operands: torch keeps the weights of all gates in one tensor."""
    return call.give_up(f"{call.label} runs a recurrence over it")
