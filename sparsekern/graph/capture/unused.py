"""Parts of a program with unused results, such as attention weights that are thrown away."""

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
    """Remove the ops that change neither an output nor a tensor and have no counted cost.

    Checks of values are removed, too: they compute nothing and also hold for the smaller network. The
    dry run shows whether the removed code runs at a smaller size. The same goes for the graphs inside of
    ``module``, which are regions under autocast or a gradient mode.

    Args:
        module: the traced graph, changed in place.
    """
    for inner in module.children():
        if isinstance(inner, fx.GraphModule):
            drop_unused(inner)
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
    """Whether ``node`` computes a number from numbers, such as a condition that is already decided."""
    return not isinstance(node.target, torch._ops.OperatorBase) and isinstance(
        node.meta.get("val"), (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
    )


def macs(node: fx.Node) -> int:
    """Count the multiply-adds of an op with torch's flop counter.

    Args:
        node: a call of an ATen op, with its fake operands in ``meta["val"]``.

    Returns:
        Half of the flops; 0 if the sizes depend on data.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    mode = detect_fake_mode(pytree.tree_leaves((args, kwargs)))
    target: Any = node.target
    with suppress(Exception):
        with mode or nullcontext(), FlopCounterMode(display=False) as counter:
            target(*args, **kwargs)
        return int(counter.get_total_flops()) // 2
    return 0
