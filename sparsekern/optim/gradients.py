"""Hooks on the gradients of parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsekern.distributed.tensors import is_sharded


def change_gradient(parameter: nn.Parameter, change: Callable[[Tensor], object]) -> RemovableHandle:
    """Change every gradient of a parameter in the backward pass, before anything else uses it.

    The hook works for a parameter that is frozen now and trained later, and after a load that swaps tensors.

    Args:
        parameter: the parameter, plain or sharded.
        change: changes a gradient in place; that of a sharded parameter is the accumulated one.

    Returns:
        A handle whose ``remove()`` removes the hook.
    """

    def changed(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        # Autograd may use the same tensor elsewhere.
        own = grad.clone()
        change(own)
        return own

    def accumulated(param: Tensor) -> None:
        if param.grad is not None:
            change(param.grad)

    trained = parameter.requires_grad
    # torch takes no hooks for a parameter while it is frozen.
    parameter.requires_grad_(True)
    try:
        if is_sharded(parameter):
            # The parts of a gradient exist only once they are accumulated.
            return parameter.register_post_accumulate_grad_hook(accumulated)
        if parameter._backward_hooks is not None:
            # A load that swaps tensors leaves the hooks with the old one; this registers them anew.
            parameter._backward_hooks = parameter._backward_hooks
        return parameter.register_hook(changed)
    finally:
        parameter.requires_grad_(trained)
