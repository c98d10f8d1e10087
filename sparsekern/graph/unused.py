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


def drop_unused(module: fx.GraphModule) -> None:
    """Remove what changes neither the outputs nor any tensor, and costs nothing that is counted.

    What else such a part does, it also does at a smaller size: the dry run shows whether it can.
    """
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and not node.users and _idle(node):
            module.graph.erase_node(node)
    module.recompile()


def _idle(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return macs(node) == 0


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
