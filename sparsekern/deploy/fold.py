"""Folding batch norms into the convolutions and linears before them, as the traced graph has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from sparsekern.graph.capture.program import Captured
from sparsekern.graph.capture.source import Source
from sparsekern.nn import NormAct2d

_ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish, "silu": F.silu}


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that alone reads its result, by their first names in the model.

    Attributes:
        layer: name of the convolution or linear.
        norm: name of the batch norm.
    """

    layer: str
    norm: str


@dataclass(frozen=True)
class Calls:
    """What a trace of evaluation mode says about a model.

    Attributes:
        pairs: layers and batch norms that can be folded.
        called: names of the modules in whose forward an op runs, under all their names.
    """

    pairs: tuple[Pair, ...]
    called: frozenset[str]


class Activation(nn.Module):
    """The rest of a :class:`~sparsekern.nn.NormAct2d` whose norm was folded: ``activation(x + residual)``."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add the residual, if there is one, and apply the activation; shapes are those of ``x``."""
        x = x if residual is None else x + residual
        return _ACTIVATIONS[self.activation](x) if self.activation in _ACTIVATIONS else x

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def find_calls(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Trace ``model`` in evaluation mode, without running it, and find what can be folded.

    A batch norm is folded into a layer if every call of the norm reads a call of the layer, nothing else
    reads the results of these calls, no hook may change them, and no other module reads the tensors of the
    two. The norm has running statistics.

    Args:
        model: the model.
        args: positional arguments of its forward pass.
        kwargs: keyword arguments.

    Raises:
        ValueError: ``model`` cannot be traced or does not accept the arguments.
    """
    source = Source(model, args, kwargs)
    found = [_calls_of(model, source, captured) for captured in source.export(False)]
    # A forward that decides by values has several courses. What is folded must be right in each of them.
    pairs = [pair for pair in found[0].pairs if all(pair in other.pairs for other in found)]
    return Calls(tuple(pairs), frozenset().union(*(one.called for one in found)))


def _calls_of(model: nn.Module, source: Source, captured: Captured) -> Calls:
    """See :func:`find_calls`, for one course of the forward."""
    modules = dict(model.named_modules())
    first = {id(module): name for name, module in modules.items()}
    names = {name: first[id(m)] for name, m in model.named_modules(remove_duplicate=False)}
    layers: dict[str, list[Node]] = {}
    norms: dict[str, list[Node]] = {}
    called: set[str] = set()
    for node in captured.module.graph.nodes:
        stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
        if node.op != "call_function" or not stack:
            continue
        called.update(stack)
        owner = names.get(stack[-1])
        if owner is None:
            continue
        target = str(node.target)
        if target.startswith(("aten.conv", "aten.linear.")) and _is_layer(modules[owner]):
            layers.setdefault(owner, []).append(node)
        elif target.startswith("aten.batch_norm.") and isinstance(modules[owner], _BatchNorm):
            norms.setdefault(owner, []).append(node)
    tensors = {
        node: source.tensors[number].names
        for node in captured.module.graph.nodes
        if node.op == "placeholder" and isinstance(number := captured.sources.get(node.name), int)
    }
    pairs = []
    for layer, nodes in layers.items():
        norm = _norm_of(nodes, norms)
        if norm is None or replacement(modules[norm]) is None:
            continue
        own = _reads_its_own(nodes, layer, tensors) and _reads_its_own(norms[norm], norm, tensors)
        if own and _fits(modules[layer], modules[norm], nodes, norms[norm]):
            pairs.append(Pair(layer, norm))
    return Calls(tuple(pairs), frozenset(called))


def fold(model: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold every pair, in place: the layer gets the weights of both, another module replaces the norm."""
    modules = dict(model.named_modules())
    for pair in pairs:
        layer, norm = modules[pair.layer], modules[pair.norm]
        assert isinstance(norm, _BatchNorm)
        _fold_weights(layer, norm)
        replace(model, norm, replacement(norm) or nn.Identity())


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a submodule under all its names, in place."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def replacement(norm: nn.Module) -> nn.Module | None:
    """What is left of a batch norm whose arithmetic is in the layer before it; None if that is not known.

    Subclasses that contain their activation as a module, such as those of timm, leave that module.
    """
    if isinstance(norm, NormAct2d):
        return Activation(norm.activation)
    if type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return nn.Identity()
    children = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    return nn.Sequential(*children) if list(norm.children()) else None


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is a convolution or linear that adds ``bias`` once it has one."""
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return False
    plain = type(module).forward.__module__.startswith("torch.nn.modules.")
    return plain or module.bias is not None


def _norm_of(nodes: Sequence[Node], norms: Mapping[str, Sequence[Node]]) -> str | None:
    """The norm whose calls are the only readers of ``nodes``, one for each, and that has no other calls."""
    readers = [list(node.users) for node in nodes]
    if any(len(own) != 1 or own[0].args[0] is not node for node, own in zip(nodes, readers, strict=True)):
        return None
    only = {own[0] for own in readers}
    return next((name for name, own in norms.items() if set(own) == only), None)


def _reads_its_own(nodes: Sequence[Node], name: str, tensors: Mapping[Node, tuple[str, ...]]) -> bool:
    """Whether the tensors that calls of a module read are registered in it alone, and read by it alone."""
    operands = [arg for node in nodes for arg in node.args[1:5] if isinstance(arg, Node)]
    for operand in operands:
        if operand not in tensors or not set(operand.users) <= set(nodes):
            return False
        if not any(full.rpartition(".")[0] == name for full in tensors[operand]):
            return False
    return True


def _fits(layer: nn.Module, norm: nn.Module, layers: Sequence[Node], norms: Sequence[Node]) -> bool:
    """Whether the norm uses running statistics of the layer's output channels."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None or any(node.args[5] for node in norms):
        return False
    # Behind a linear, a norm of three dimensions normalises positions and not features.
    ranks = {node.meta["val"].ndim for node in layers}
    return ranks == {2} if isinstance(layer, nn.Linear) else True


@torch.no_grad()
def _fold_weights(layer: Any, norm: _BatchNorm) -> None:
    """Set weight and bias of ``layer`` to those of layer and norm together, by torch's formulas."""

    # In float64, so that weights are rounded once, at the end.
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().cpu().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().cpu().double()
    weight: Tensor = layer.weight.detach().cpu().double()
    bias = None if layer.bias is None else layer.bias.detach().cpu().double()
    fused: tuple[Tensor, Tensor]
    if isinstance(layer, nn.Linear):
        fused = fuse_linear_bn_weights(weight, bias, mean, variance, norm.eps, gamma, beta)
    elif isinstance(layer, _ConvTransposeNd):
        # torch's formula knows one group. Groups side by side in the output dimension are one.
        together = _side_by_side(weight, layer.groups)
        fused_weight, fused_bias = fuse_conv_bn_weights(
            together, bias, mean, variance, norm.eps, gamma, beta, transpose=True
        )
        fused = _apart(fused_weight, layer.groups), fused_bias
    else:
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, gamma, beta)
    layer.weight = _parameter(fused[0], layer.weight)
    layer.bias = _parameter(fused[1], layer.weight)


def _side_by_side(weight: Tensor, groups: int) -> Tensor:
    """``[groups * inputs, outputs, ...]`` to ``[inputs, groups * outputs, ...]``."""
    apart = weight.unflatten(0, (groups, -1))
    return apart.transpose(0, 1).flatten(1, 2)


def _apart(weight: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`_side_by_side`."""
    together = weight.unflatten(1, (groups, -1))
    return together.transpose(0, 1).flatten(0, 1)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=False)


def batch_norms(model: nn.Module) -> Iterator[str]:
    """Names of the batch norms of ``model``, each once."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name
