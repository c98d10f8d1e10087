"""A network for inference in torch: folded norms, nothing without effect, the faster memory format."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekern.compact import Plan, compact, verify
from sparsekern.compact.surgery import forget_plan
from sparsekern.compact.verify import as_arguments
from sparsekern.deploy.fold import find_calls, fold
from sparsekern.deploy.simplify import (
    drop_dropout,
    drop_identities,
    hooked,
    remove_hooks,
    settle_weights,
)
from sparsekern.distributed.tensors import unwrap
from sparsekern.latency.timing import Stopwatch

# Allowed difference over the largest output. Folding rounds the weights once more.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

# The memory formats to choose from, by the rank of the weights of convolutions.
_FORMATS = {
    4: (torch.contiguous_format, torch.channels_last),
    5: (torch.contiguous_format, torch.channels_last_3d),
}
# Each memory format is timed in turn. There are at least ROUNDS rounds, up to MOST_ROUNDS until SHORTEST s.
ROUNDS, MOST_ROUNDS, SHORTEST = 3, 25, 0.5


def deploy(
    small: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    memory_format: torch.memory_format | None = None,
    tolerance: float | None = None,
) -> nn.Module:
    """A copy of a network that computes the same in evaluation mode, in less time.

    * Batch norms are folded into the convolutions and linears whose results they alone read, by the traced
      graph. Transposed, grouped and depthwise convolutions are included. Shared modules are folded if all
      their calls allow it.
    * Dropout becomes an identity, and identities leave every ``nn.Sequential``.
    * Weights that are computed in each pass (parametrizations, weight norm, spectral norm) become plain.
    * Hooks are removed, gradients are switched off.
    * Convolutions get the memory format, contiguous or channels last, that takes less time on the example
      with the current number of threads.

    Before it is returned, the copy runs on the example, and its outputs are compared with those of ``small``.

    Args:
        small: the network, compact or not; it stays as it is.
        example_inputs: a tensor or a tuple of the positional arguments, of a size that is used later.
        example_kwargs: keyword arguments.
        memory_format: ``torch.contiguous_format``, ``torch.channels_last`` or ``torch.channels_last_3d``;
            None for the faster one.
        tolerance: largest difference allowed, over the largest magnitude of an output. Default: 1e-12 for
            float64, 1e-5 for float32, 1e-2 for float16, 5e-2 for bfloat16.

    Returns:
        The copy, in evaluation mode, without hooks. Its state dict has other names than that of ``small``, so
        keep :func:`sparsekern.save` for ``small``.

    Raises:
        TypeError: ``small`` is not a module.
        ValueError: ``small`` cannot be copied or traced, does not accept the example, or its outputs differ
            from those of the copy, for example because a hook changes them.
    """
    if not isinstance(small, nn.Module):
        raise TypeError(f"small: got {type(small).__name__}, expected a torch.nn.Module")
    small = unwrap(small)
    args, kwargs = as_arguments(example_inputs, example_kwargs)
    limit = _tolerance(small) if tolerance is None else tolerance
    problem = ""
    for thorough in (True, False):
        deployed = _folded(small, args, kwargs, thorough)
        try:
            _set_format(deployed, args, kwargs, memory_format)
            difference = verify(small, deployed, args, example_kwargs=kwargs)
        except (AttributeError, IndexError, KeyError) as error:
            # The forward looks for a module that is gone.
            problem = f"the deployed copy does not run ({type(error).__name__}: {error})"
            continue
        if difference <= limit:
            return deployed
        problem = f"the deployed copy differs by {difference:.1e} of the largest output"
    raise ValueError(f"small: {problem}, expected at most {limit:.0e}{_advice(small)}")


def _folded(small: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], thorough: bool) -> nn.Module:
    """The copy before its memory format; without ``thorough``, no module leaves its place."""
    copy = compact(small, Plan({})).eval()
    forget_plan(copy)
    settle_weights(copy)
    calls = find_calls(copy, args, kwargs)
    remove_hooks(copy)
    fold(copy, calls.pairs)
    drop_dropout(copy)
    if thorough:
        drop_identities(copy, calls.called)
    return copy.eval().requires_grad_(False)


def _tolerance(model: nn.Module) -> float:
    """The tolerance for the least precise dtype of the model's parameters."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return max(
        (TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES), default=TOLERANCES[torch.float32]
    )


def _advice(small: nn.Module) -> str:
    names = hooked(small)
    if not names:
        return "; pass a larger tolerance if rounding explains it"
    return f"; hooks of {', '.join(names[:3])} are not part of the copy: build what they do into the forward"


def _set_format(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: torch.memory_format | None
) -> None:
    """Give convolutions the memory format ``given``, or the faster one, in place."""
    ranks = {p.ndim for p in model.parameters() if p.ndim in _FORMATS}
    if len(ranks) != 1:
        return
    formats = _FORMATS[ranks.pop()]
    if given is not None:
        if given not in formats:
            raise ValueError(f"memory_format: got {given}, expected one of {', '.join(map(str, formats))}")
        model.to(memory_format=given)  # type: ignore[call-overload]
        return
    copies = {form: compact(model, Plan({})).to(memory_format=form) for form in formats}  # type: ignore[call-overload]
    runs = {form: partial(copy, *args, **kwargs) for form, copy in copies.items()}
    seconds = _seconds(runs, _device(model, args, kwargs))
    model.to(memory_format=min(seconds, key=seconds.__getitem__))  # type: ignore[call-overload]


@torch.inference_mode()
def _seconds(runs: Mapping[torch.memory_format, Callable[[], Any]], device: torch.device) -> dict[Any, float]:
    """Median seconds of each function; they take turns, so that a slow phase affects all of them."""
    watch = Stopwatch(device)
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    total = 0.0
    for turn in range(MOST_ROUNDS):
        for key, run in runs.items():
            times[key].append(watch.seconds(run))
            total += times[key][-1]
        if turn + 1 >= ROUNDS and total >= SHORTEST:
            break
    return {key: statistics.median(own) for key, own in times.items()}


def _device(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    tensors = [*model.parameters(), *(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))]
    return tensors[0].device if tensors else torch.device("cpu")
