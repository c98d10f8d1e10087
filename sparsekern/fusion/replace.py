"""Fusing batch norms with the activations that follow them in the traced graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sparsekern.distributed.tensors import unwrap
from sparsekern.graph.capture.export import arguments, capture, inner_module
from sparsekern.graph.capture.undisturbed import low_overhead_tracing
from sparsekern.nn import FusedActivation, NormAct2d

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Fused:
    """One batch norm that became a :class:`~sparsekern.nn.NormAct2d`.

    Attributes:
        norm: name of the batch norm.
        kind: the fused activation, ``"identity"`` for none.
        activations: names of the fused activation modules.
        reason: why no activation is fused; empty if one is.
    """

    norm: str
    kind: str
    activations: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind} of {', '.join(self.activations)}" if self.activations else self.reason


@dataclass(frozen=True)
class Fusion:
    """Result of :func:`fuse`; ``str`` of it is a table.

    Attributes:
        model: the model.
        fused: its batch norms, in the order of the model's modules.
    """

    model: nn.Module
    fused: tuple[Fused, ...]

    def undo(self) -> None:
        """Convert all fused modules back to torch's, see :func:`unfuse`."""
        unfuse(self.model)

    def __str__(self) -> str:
        width = max((len(one.norm) for one in self.fused), default=0)
        pairs = [one for one in self.fused if one.activations]
        alone = [one for one in self.fused if not one.activations]
        lines = [f"{len(pairs)} of {len(self.fused)} batch norms compute their activation"]
        lines += [f"  {one.norm.ljust(width)}  {one}" for one in pairs]
        if alone:
            lines += ["", "by themselves"]
            lines += [f"  {one.norm.ljust(width)}  {one}" for one in alone]
        return "\n".join(lines)


@low_overhead_tracing()
def fuse(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Fusion:
    """Fuse batch norms with the activations that follow them, in place.

    The model is traced in evaluation and in training mode, without being run. A ``BatchNorm2d`` becomes a
    :class:`~sparsekern.nn.NormAct2d` that computes its activation under two conditions. The activation alone
    reads the result of every call of the norm. The activation is a module (``ReLU``, ``ReLU6``,
    ``Hardswish``, ``SiLU``) that follows only fused norms. The activation module then returns its input.
    Other norms become a ``NormAct2d`` without an activation.

    The modules stay the same objects with the same parameters, so that optimizers, checkpoints and names
    stay valid. Outputs and gradients equal torch's up to rounding. Subclasses, such as ``SyncBatchNorm``,
    stay unchanged.

    Args:
        model: the model on its training device; also the result of ``torch.compile`` or data parallelism.
        example_inputs: a tensor or a sequence of the positional arguments of ``model``.
        example_kwargs: keyword arguments of ``model``.

    Returns:
        The activation of each norm, or the reason for none. :meth:`Fusion.undo` reverts the change.

    Raises:
        ValueError: ``model`` cannot be traced or does not accept the inputs. Nothing is changed.
    """
    model = inner_module(model)
    captured = capture(model, arguments(example_inputs), example_kwargs or {})
    calls = _Calls(model)
    for graph in captured.graphs:
        calls.read(graph.module.graph)
    fused = _decide(calls)
    for one in fused:
        norm = calls.modules[one.norm]
        assert isinstance(norm, nn.BatchNorm2d)
        NormAct2d.adopt(norm, one.kind)
    for name in {name for one in fused for name in one.activations}:
        FusedActivation.adopt(calls.modules[name])
    return Fusion(model, fused)


def unfuse(model: nn.Module) -> None:
    """Convert the modules that :func:`fuse` changed back to torch's, in place.

    Parameters keep their present values. A :class:`~sparsekern.nn.NormAct2d` that :func:`fuse` did not make
    stays unchanged.

    Args:
        model: the fused model or a copy of it.

    Raises:
        ValueError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    for module in unwrap(model).modules():
        if isinstance(module, FusedActivation):
            FusedActivation.release(module)
        elif isinstance(module, NormAct2d):
            NormAct2d.release(module)


class _Calls:
    """The calls of a model's modules, by the first name of each module.

    Attributes:
        modules: all modules by name, each once.
        norms: nodes of the batch norm op, by name of the batch norm.
        activations: nodes of the activation, by name of the activation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        first = {id(module): name for name, module in self.modules.items()}
        every = model.named_modules(remove_duplicate=False)
        self._name = {name: first[id(module)] for name, module in every}
        self.norms: dict[str, list[Node]] = {}
        self.activations: dict[str, list[Node]] = {}

    def read(self, graph: torch.fx.Graph) -> None:
        """Record the nodes of batch norms and activations in a traced graph."""
        for node in graph.nodes:
            name = self.owner(node)
            if name is None:
                continue
            module = self.modules[name]
            if isinstance(module, nn.BatchNorm2d) and str(node.target).startswith("aten.batch_norm"):
                self.norms.setdefault(name, []).append(node)
            elif _kind(module) is not None:
                self.activations.setdefault(name, []).append(node)

    def owner(self, node: Node) -> str | None:
        """The name of the innermost module that computes the node."""
        stack = node.meta.get("nn_module_stack")
        if node.op != "call_function" or not stack:
            return None
        return self._name.get(list(stack.values())[-1][0])


def _decide(calls: _Calls) -> tuple[Fused, ...]:
    """Decide for each norm whether its activations are fused."""
    followed: dict[str, set[str]] = {}
    alone: dict[str, str] = {}
    norms = [name for name, module in calls.modules.items() if type(module) is nn.BatchNorm2d]
    for name in norms:
        try:
            followed[name] = _activations_of(name, calls)
        except _Reason as why:
            alone[name] = str(why)
    # The activations of an unfused norm cannot be fused into other norms that they follow.
    while (stuck := next(_blocked(followed, calls), None)) is not None:
        followed.pop(stuck[0])
        alone[stuck[0]] = stuck[1]

    def fused(name: str) -> Fused:
        if name in alone:
            return Fused(name, "identity", reason=alone[name])
        kind = _kind(calls.modules[min(followed[name])])
        assert kind is not None
        return Fused(name, kind, tuple(sorted(followed[name])))

    return tuple(fused(name) for name in norms)


class _Reason(Exception):
    """Why a norm has no fused activation."""


def _activations_of(name: str, calls: _Calls) -> set[str]:
    """The activations that follow the calls of a norm.

    Raises:
        _Reason: another operation follows a call, or the modules have hooks.
    """
    if _hooked(calls.modules[name]):
        raise _Reason("it has hooks, which would see what comes out of the activation")
    nodes = calls.norms.get(name)
    if not nodes:
        raise _Reason("it is not called")
    found: set[str] = set()
    for node in nodes:
        readers = list(node.users)
        if len(readers) != 1:
            raise _Reason(f"{len(readers)} operations read what it gives, expected an activation alone")
        owner = calls.owner(readers[0])
        if owner is None or owner not in calls.activations:
            raise _Reason(f"{_target(readers[0])} follows it, expected an activation that is a module")
        if _hooked(calls.modules[owner]):
            raise _Reason(f"its activation {owner} has hooks, which would see another input")
        found.add(owner)
    if len({_kind(calls.modules[owner]) for owner in found}) > 1:
        raise _Reason("its calls are followed by different activations")
    return found


def _blocked(followed: Mapping[str, set[str]], calls: _Calls) -> Iterator[tuple[str, str]]:
    """Norms, with the reason, whose activation also follows an operation that is not fused."""
    taken = {node for name in followed for node in calls.norms[name]}
    for name, owners in followed.items():
        for owner in sorted(owners):
            if any(node.args[0] not in taken for node in calls.activations[owner]):
                yield name, f"its activation {owner} is called elsewhere, too"


def _kind(module: nn.Module) -> str | None:
    """The name of an activation that can be fused, None for any other module."""
    if type(module) is nn.Hardtanh:
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    return _ACTIVATIONS.get(type(module))


def _hooked(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks."""
    return any(getattr(module, name) for name in _HOOKS)


def _target(node: Node) -> str:
    """The operation of a node, for messages."""
    return "the output of the model" if node.op == "output" else str(node.target).removesuffix(".default")
