"""The placeholder op for a user's hook (:mod:`sparsekern.graph.capture.hooks`)."""

from __future__ import annotations

from sparsekern.graph.propagate.rules.base import Call, Result, register_rule


@register_rule("sparsekern_graph::hooked")
def hooked(call: Call) -> Result:
    """The effect of a hook is unknown, so its operand is frozen."""
    return call.give_up(f"a hook of {call.module or 'the network'} may change it")
