"""Records of runs and exported graphs: which op of the one is which node of the other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from sparsekern.graph.capture.courses import steps
from sparsekern.graph.capture.program import CONSTANT, Captured
from sparsekern.graph.capture.record import (
    Origin,
    Record,
    Step,
    contents,
    live,
    numbers_of,
    sizes,
    written_copies,
)

# An export adds these around constants.
_ADDED = frozenset(
    {"aten::detach", "aten::detach_", "aten::alias", "aten::lift_fresh", "aten::lift_fresh_copy"}
)


def attached(record: Record, graph: Captured) -> Record | None:
    """Find the node of every op in an exported graph of the same run.

    Args:
        record: the record of a run.
        graph: the exported graph.

    Returns:
        The record with the nodes; None if one of the ops or nodes has no counterpart.
    """
    ops = list(record.steps)
    origins: dict[fx.Node, Origin | None] = {}
    position = 0
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            source = graph.sources.get(node.name)
            origins[node] = ("tensor", source) if isinstance(source, int) else None
        elif node.op == "output":
            ops[-1] = ops[-1]._replace(node=node)
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            made = origins.get(node.args[0])
            origins[node] = None if made is None else (made[0], node.args[1])
        elif isinstance(node.target, torch._ops.OpOverload):
            sources = [origins.get(n) for n in _operands(node)]
            found = next((n for n in range(position, len(ops)) if _fits(ops[n], node, sources)), None)
            if found is not None:
                ops[found] = ops[found]._replace(node=node)
                origins[node] = found, 0
                position = found + 1
            elif node.target._schema.name in _ADDED and len(sources) == 1:
                origins[node] = sources[0]
            else:
                return None
        elif isinstance(node.target, torch._ops.HigherOrderOperator) or _is_region(graph.module, node):
            return None
    whole = Record(ops, record.written)
    lost = [step for step in live(whole, True) if step.node is None and step.shapes]
    return None if lost else whole


def _is_region(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)


def _operands(node: fx.Node) -> list[fx.Node]:
    leaves = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda leaf: isinstance(leaf, slice))
    return [n for n in leaves if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), Tensor)]


def _fits(step: Step, node: fx.Node, sources: Sequence[Origin | None]) -> bool:
    if step.target is not node.target or len(step.sources) != len(sources):
        return False
    made = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    if list(step.numbers) != numbers_of(step.target, node.args, node.kwargs):
        return False
    known = all(ours is None or ours == theirs for ours, theirs in zip(sources, step.sources, strict=True))
    return known and step.shapes == tuple(sizes(tensor) for tensor in made)


def exported(graph: Captured) -> Record:
    """The ops of an exported graph as a record, with their nodes."""
    origins: dict[fx.Node, Origin] = {}
    found: list[Step] = []
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            source = graph.sources.get(node.name)
            plain = "input", node.name
            if source == CONSTANT:
                plain = "constant", _contents_of(graph.constants.get(node.name))
            origins[node] = ("tensor", source) if isinstance(source, int) else plain
    for node in steps(graph.module):
        sources = tuple(origins.get(n, ("inner", n.name)) for n in node.all_input_nodes)
        numbers: Sequence[Any]
        if isinstance(node.target, torch._ops.OpOverload):
            numbers = numbers_of(node.target, node.args, node.kwargs)
        else:
            kinds: tuple[type, ...] = (int, float) if node.op == "output" else (float,)
            numbers = [n for n in pytree.tree_leaves((node.args, node.kwargs)) if type(n) in kinds]
        made = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
        shapes = tuple(sizes(tensor) for tensor in made)
        origins[node] = len(found), 0
        found.append(Step(node.target, sources, tuple(numbers), shapes, (), node))
    return Record(found, written_copies(found))


def _contents_of(constant: Any) -> Any:
    # Constants computed on fake tensors have no data. Ops of the graph made them and are compared.
    fake = isinstance(constant, FakeTensor) or not isinstance(constant, Tensor)
    return None if fake else (tuple(constant.shape), contents(constant))
