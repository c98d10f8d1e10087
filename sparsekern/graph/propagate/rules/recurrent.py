"""Recurrent layers: their state feeds back through gates whose rows are no channels of their own."""

from __future__ import annotations

from sparsekern.graph.propagate.rules.base import Call, Result, register_rule


@register_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrence(call: Call) -> Result:
    """The weights of all gates are one tensor, of which torch's module knows one hidden size."""
    return call.give_up(f"{call.label} runs a recurrence over it")
