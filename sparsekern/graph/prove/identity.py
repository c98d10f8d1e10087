"""Which parameters of a block make it the identity when they are zero.

A residual block adds branches to its input. If the last layer of every branch is zero, the branches are exact
zeros and the block returns its input, bit by bit (a negative zero may become a positive one). Whether it does
follows from its ops alone: the analysis goes from the output of the block back to its input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Zero if the first operand is. Elementwise functions with f(0) = 0, moves, means and sums.
_KEEP_ZERO = _words(
    "abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d alias avg_pool1d avg_pool2d "
    "avg_pool3d chunk clone contiguous detach dropout elu expand feature_dropout flatten flip gelu "
    "hardswish leaky_relu max_pool2d mean mish movedim narrow neg permute pixel_shuffle "
    "pixel_unshuffle prelu relu relu6 repeat reshape roll select silu slice split split_with_sizes "
    "squeeze sum t tanh to to_copy transpose type_as unflatten unsqueeze view view_as "
    "upsample_bilinear2d upsample_nearest2d _to_copy"
)
# The same elements in the same order.
_SAME_ORDER = _words(
    "alias clone contiguous detach flatten reshape squeeze to unflatten unsqueeze view view_as _to_copy"
)
_PRODUCTS = _words("mul matmul mm bmm")
_WEIGHTED = _words(
    "linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d"
)
# Position of the weight and the bias, and whether an input of zeros has zeros before them.
_NORMS = {"batch_norm": (1, 2, False), "layer_norm": (2, 3, True), "group_norm": (2, 3, True)}
_NOT_NEGATIVE = _words("relu relu6 sigmoid hardsigmoid softmax exp abs softplus square")
_KEEP_SIGN = _words(
    "alias adaptive_avg_pool2d avg_pool2d clone contiguous detach dropout flatten max_pool2d mean "
    "permute reshape select slice squeeze sum to transpose unflatten unsqueeze view _to_copy "
    "feature_dropout"
)
# These write to memory that the first operand may share.
_VIEWS = _words(
    "alias chunk contiguous detach expand flatten movedim narrow permute reshape select slice split "
    "squeeze t to transpose unflatten unsqueeze view view_as"
)

Needed = frozenset[int]
_NOTHING: Needed = frozenset()


@dataclass
class Identity:
    """The analysis of one block in one graph.

    Attributes:
        nodes: the nodes of the block.
        own: the numbers of the block's parameters, by placeholder.
        entry: the value that the block may return.
    """

    nodes: Collection[fx.Node]
    own: Mapping[fx.Node, int]
    entry: fx.Node
    _zero: dict[fx.Node, Needed | None] = field(default_factory=dict)
    _same: dict[fx.Node, Needed | None] = field(default_factory=dict)

    def needed(self, output: fx.Node) -> Needed | None:
        """Find parameters that make the block return its input when all of their values are zero.

        Args:
            output: the value that the block returns.

        Returns:
            The numbers of the parameters, those nearest to the output of each branch; None if there are none
            or the block is not the identity then.
        """
        found = self.same(output)
        return found if found and _form(output) == _form(self.entry) else None

    def same(self, node: fx.Node) -> Needed | None:
        """Parameters that have to be zero so that the node has the values of the entry, in their order."""
        if node is self.entry:
            return _NOTHING
        if node not in self._same:
            self._same[node] = None
            self._same[node] = self._same_of(node) if node in self.nodes else None
        return self._same[node]

    def _same_of(self, node: fx.Node) -> Needed | None:
        name, first = _name(node), _operand(node, 0)
        if first is None or not _same_numbers(node, self.entry):
            return None
        if name in _SAME_ORDER:
            return self.same(first)
        if name == "relu":
            return self.same(first) if is_not_negative(self.entry) else None
        if name not in ("add", "sub"):
            return None
        second = _operand(node, 1)
        if second is None:
            return None
        ways = [(first, second)]
        if name == "add" and _keyword(node, "alpha", 2, 1) == 1:
            ways.append((second, first))
        for stream, branch in ways:
            base = self.same(stream)
            if base is None or _form(stream) != _form(node):
                continue
            zeros = self.zero(branch)
            if zeros is not None and (node.target is not None) and self._unspoiled(node, stream):
                return base | zeros
        return None

    def _unspoiled(self, node: fx.Node, stream: fx.Node) -> bool:
        """Whether nothing reads the old values of memory that the op writes the stream to."""
        written = _operand(node, 0)
        if not _mutates(node) or written is stream or written is None:
            return True
        return not read_later(written, node)

    def zero(self, node: fx.Node) -> Needed | None:
        """Parameters that have to be zero so that the node is zero; None if it is not known."""
        if node in self.own:
            return frozenset({self.own[node]})
        if node not in self._zero:
            self._zero[node] = None
            known = node in self.nodes or _is_of_parameters(node, self.own)
            self._zero[node] = self._zero_of(node) if known else None
        return self._zero[node]

    def _zero_of(self, node: fx.Node) -> Needed | None:
        name = _name(node)
        if name == "getitem":
            return self._zero_operand(node, 0)
        if _mutates(node) and (written := _operand(node, 0)) is not None and read_later(written, node):
            return None
        if name in _KEEP_ZERO:
            return self._zero_operand(node, 0)
        if name == "div":
            return self._zero_operand(node, 0) if _operand(node, 1) is None else None
        if name in _PRODUCTS:
            return self._nearest([_operand(node, 0), _operand(node, 1)])
        if name in _WEIGHTED:
            return _both(
                self._nearest([_operand(node, 1), _operand(node, 0)]), self._zero_or_missing(node, 2, "bias")
            )
        if name == "addmm":
            product = self._nearest([_operand(node, 2), _operand(node, 1)])
            return _both(product, self._zero_operand(node, 0))
        if name == "scaled_dot_product_attention":
            return self._zero_operand(node, 2)
        if name in ("add", "sub"):
            return _both(self._zero_operand(node, 0), self._zero_operand(node, 1))
        if name in ("cat", "stack"):
            parts = node.args[0] if isinstance(node.args[0], (list, tuple)) else ()
            return _all([self.zero(part) if isinstance(part, fx.Node) else None for part in parts])
        return self._zero_norm(node, name)

    def _zero_norm(self, node: fx.Node, name: str) -> Needed | None:
        if name == "rms_norm":
            return self._nearest([_operand(node, 2, "weight"), _operand(node, 0)])
        if name not in _NORMS:
            return None
        weight, bias, passes = _NORMS[name]
        scale = [_operand(node, weight, "weight"), *([_operand(node, 0)] if passes else [])]
        return _both(self._nearest(scale), self._zero_or_missing(node, bias, "bias"))

    def _zero_operand(self, node: fx.Node, place: int) -> Needed | None:
        operand = _operand(node, place)
        return None if operand is None else self.zero(operand)

    def _zero_or_missing(self, node: fx.Node, place: int, keyword: str) -> Needed | None:
        operand = _operand(node, place, keyword)
        return _NOTHING if operand is None else self.zero(operand)

    def _nearest(self, factors: Sequence[fx.Node | None]) -> Needed | None:
        """Of a product: its own parameter if it has one, else the factor with fewer parameters."""
        given = [factor for factor in factors if factor is not None]
        for factor in given:
            if factor in self.own or _is_of_parameters(factor, self.own):
                found = self.zero(factor)
                if found is not None:
                    return found
        known = [found for factor in given if (found := self.zero(factor)) is not None]
        return min(known, key=len) if known else None


def is_not_negative(node: fx.Node) -> bool:
    """Whether the ops that make a value leave nothing below zero, for any input of the network."""
    while True:
        name = _name(node)
        if name in _NOT_NEGATIVE:
            return True
        if name in ("hardtanh", "clamp", "clamp_min"):
            least = _keyword(node, "min_val" if name == "hardtanh" else "min", 1, -1)
            return type(least) in (int, float) and least >= 0
        first = _operand(node, 0)
        if first is None:
            return False
        if name == "add":
            second = _operand(node, 1)
            positive = _keyword(node, "alpha", 2, 1) == 1
            return positive and second is not None and is_not_negative(first) and is_not_negative(second)
        if name not in _KEEP_SIGN:
            return False
        node = first


def _both(one: Needed | None, other: Needed | None) -> Needed | None:
    return None if one is None or other is None else one | other


def _all(parts: Sequence[Needed | None]) -> Needed | None:
    found = [part for part in parts if part is not None]
    return _NOTHING.union(*found) if parts and len(found) == len(parts) else None


def _name(node: fx.Node) -> str:
    """The name of an op without the mark of an op in place; ``getitem`` for an item of several results."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(getattr(node.target, "__name__", ""))
    name = node.target._schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def read_later(written: fx.Node, writer: fx.Node) -> bool:
    """Whether a node after ``writer`` reads ``written``, or another value that may share its memory."""
    order = {node: number for number, node in enumerate(writer.graph.nodes)}
    shared = set(_viewed(written))
    waiting = list(shared)
    while waiting:
        for user in waiting.pop().users:
            if user not in shared and order[user] < order[writer] and _name(user) in _VIEWS:
                shared.add(user)
                waiting.append(user)
    return any(order[user] > order[writer] for node in shared for user in node.users)


def viewed(node: fx.Node) -> fx.Node:
    """The value whose memory a value may share: the operand of the views that make it, if views make it."""
    return _viewed(node)[-1]


def _viewed(node: fx.Node) -> list[fx.Node]:
    found = [node]
    while _name(found[-1]) in _VIEWS and (first := _operand(found[-1], 0)) is not None:
        found.append(first)
    return found


def _operand(node: fx.Node, place: int, keyword: str = "") -> fx.Node | None:
    value: Any = node.args[place] if place < len(node.args) else node.kwargs.get(keyword)
    return value if isinstance(value, fx.Node) else None


def _keyword(node: fx.Node, keyword: str, place: int, default: Any) -> Any:
    """An argument that is no tensor; ``add.Tensor(x, y, alpha=1)`` has it as a keyword alone."""
    if keyword in node.kwargs:
        return node.kwargs[keyword]
    return node.args[place] if place < len(node.args) else default


def _tensor(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _form(node: fx.Node) -> Any:
    tensor = _tensor(node)
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)


def _same_numbers(node: fx.Node, entry: fx.Node) -> bool:
    """Whether a node has as many numbers as the entry, of the same dtype."""
    one, other = _tensor(node), _tensor(entry)
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and one.numel() == other.numel()


def _is_of_parameters(node: fx.Node, own: Mapping[fx.Node, int]) -> bool:
    """Whether a value is computed from parameters of the block alone, such as a transposed weight."""
    seen: set[fx.Node] = set()
    waiting, found = [node], False
    while waiting:
        one = waiting.pop()
        if one in own:
            found = True
        elif one.op != "call_function" or not one.all_input_nodes:
            return False
        elif one not in seen:
            seen.add(one)
            waiting += one.all_input_nodes
        if len(seen) > 8:
            return False
    return found


def tensors_read(nodes: Collection[fx.Node], keep: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The nodes outside of ``nodes`` that these read, in order, if ``keep`` accepts them."""
    outside: dict[fx.Node, None] = {}
    for node in nodes:
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, fx.Node) and leaf not in nodes and keep(leaf):
                outside[leaf] = None
    return list(outside)
