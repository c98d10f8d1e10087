"""Removing from a copy of a network what does nothing in evaluation mode: dropout, identities, hooks."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from sparsekern.deploy.fold import replace

# Classes of other libraries that return their input in evaluation mode, by module and name.
_DROPS = {("timm", "DropPath"), ("timm", "DropBlock2d"), ("torchvision", "StochasticDepth")}


def settle_weights(model: nn.Module) -> None:
    """Replace weights that are computed in each pass by plain parameters, in place.

    These are the parametrizations of ``torch.nn.utils.parametrize``, and weight and spectral norms.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            _own_class(module)
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for hook in list(module._forward_pre_hooks.values()):
            kind, weight = type(hook).__name__, getattr(hook, "name", None)
            if not type(hook).__module__.startswith("torch.nn.utils.") or not isinstance(weight, str):
                continue
            if kind == "WeightNorm":
                remove_weight_norm(module, weight)
            elif kind == "SpectralNorm":
                remove_spectral_norm(module, weight)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    A copy shares the class that torch made for the original, and removing a parametrization removes a
    property from that class.
    """
    kind = type(module)
    content = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, content)


def hooked(model: nn.Module) -> list[str]:
    """Names of the modules with forward hooks."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]


def remove_hooks(model: nn.Module) -> None:
    """Remove all hooks of forward and backward passes, in place."""
    for module in model.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
        for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
            getattr(module, name).clear()
        module._forward_hooks_always_called.clear()


def drop_dropout(model: nn.Module) -> None:
    """Replace every dropout by an identity, in place."""
    for module in list(model.modules()):
        if module is not model and _does_nothing(module):
            replace(model, module, nn.Identity())


def drop_identities(model: nn.Module, called: Collection[str]) -> None:
    """Take identities out of every ``nn.Sequential`` that is called as a whole, in place.

    Args:
        model: the model.
        called: names of the modules whose forward runs. A Sequential whose items the model picks by their
            numbers is not among them.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if _is_sequence(module) and name in called:
            _strip(module)


def _strip(sequence: nn.Module) -> None:
    """Take identities out of a Sequential that is called as a whole, and out of those in it."""
    for key, child in list(sequence._modules.items()):
        if child is not None and _is_sequence(child):
            _strip(child)
        if isinstance(child, nn.Identity) or (
            child is not None and _is_sequence(child) and not child._modules
        ):
            del sequence._modules[key]


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _does_nothing(module: nn.Module) -> bool:
    """Whether the module returns its input in evaluation mode."""
    library = type(module).__module__.partition(".")[0]
    return isinstance(module, (_DropoutNd, nn.Identity)) or (library, type(module).__name__) in _DROPS
