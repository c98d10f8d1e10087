"""Parts of a program whose results nobody reads, such as attention weights that are thrown away."""

from __future__ import annotations

import operator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

_CHECKS = frozenset(
    {
        "aten::_assert_async",
        "aten::_assert_scalar",
        "aten::_assert_tensor_metadata",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    }
)


def drop_unused(module: fx.GraphModule) -> None:
    """Remove what changes neither the outputs nor any tensor, and costs nothing that is counted.

    Checks of values are among it: they compute nothing, and hold for the smaller network, too.
    What else such a part does, it also does at a smaller size: the dry run shows whether it can.
    """
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and not node.users and _idle(node):
            module.graph.erase_node(node)
    module.recompile()


def _idle(node: fx.Node) -> bool:
    if node.target is operator.getitem or _of_numbers(node):
        return True
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _CHECKS:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return macs(node) == 0


def _of_numbers(node: fx.Node) -> bool:
    """Whether it computes a number from numbers, such as a condition that has been decided."""
    return not isinstance(node.target, torch._ops.OperatorBase) and isinstance(
        node.meta.get("val"), (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
    )


def macs(node: fx.Node) -> int:
    """The multiply-adds that torch counts for an op; 0 where its sizes depend on data."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    mode = detect_fake_mode(pytree.tree_leaves((args, kwargs)))
    target: Any = node.target
    with suppress(Exception):
        with mode or nullcontext(), FlopCounterMode(display=False) as counter:
            target(*args, **kwargs)
        return int(counter.get_total_flops()) // 2
    return 0
