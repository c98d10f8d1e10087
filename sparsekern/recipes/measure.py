"""Cost and speed of networks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekern._copying import copied
from sparsekern.deploy.speed import in_turns


def parameters(model: nn.Module) -> int:
    """Number of parameter elements; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for `example`, counted on the meta device."""
    shadow = copied(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(example.to("meta"))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def latency(models: Mapping[str, nn.Module], example: Tensor, rounds: int = 11) -> dict[str, float]:
    """Median seconds of a forward pass of each model.

    The models are left in evaluation mode. They take turns in every round, so that a slow phase of the
    machine affects all of them.
    """
    passes = {name: partial(model.eval(), example) for name, model in models.items()}
    return in_turns(passes, rounds)
